"""What tests and benchmarks of kernels share: inputs, and the budget that an error has to keep."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, what: str = "result", roundings: int = 2
) -> None:
    """Largest error against fp64 at most twice that of eager PyTorch in the same dtype, plus a floor.

    On a case of few elements eager may be exact by luck; no kernel can be asked for less than the exact value rounded
    to its dtype, half a unit in the last place of the largest element. The floor is ``roundings`` such halves.

    Args:
        actual: the kernel's output.
        eager: eager PyTorch's, in the same dtype from the same inputs.
        exact: the reference's, fp64 from the same inputs.
        what: named in the message.
        roundings: how many the result of few elements may show: 2, or one per step of a chain of fp32 operations.
    """
    if actual.dtype != eager.dtype or actual.shape != exact.shape or eager.shape != exact.shape:
        raise AssertionError(
            f"{what}: {actual.dtype} {tuple(actual.shape)}; eager is {eager.dtype} {tuple(eager.shape)}, "
            f"exact {tuple(exact.shape)}"
        )
    if not exact.numel():
        return
    error, allowed = largest_error(actual, exact), 2 * largest_error(eager, exact)
    floor = roundings / 2 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if not error <= allowed + floor:  # a NaN fails
        raise AssertionError(
            f"{what}: error {error:.3g} against fp64, budget {allowed:.3g} (twice eager's) + {floor:.3g} "
            f"({roundings} roundings)"
        )


def largest_error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact.double()).abs().max().item()


@dataclass(frozen=True)
class RouterInputs:
    """Arguments of a router on flat tokens, and random upstream gradients."""

    x: Tensor  # (T, K)
    weight: Tensor  # (H, E, K) fp32
    bias: Tensor | None  # (H, E) fp32
    selection_bias: Tensor | None  # (H, E) fp32
    mask: Tensor | None  # (T,) bool
    dgates: Tensor  # (T, H, E) fp32
    dsums: Tensor  # (H, 1 + E) fp32

    def double(self) -> RouterInputs:
        """The same values in fp64: what the reference computes exact results from."""
        floating = {
            f.name: value.double()
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None and value.is_floating_point()
        }
        return replace(self, **floating)


def router_inputs(
    tokens: int,
    features: int,
    heads: int,
    experts: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    bias: bool = False,
    selection_bias: bool = False,
    mask: bool = False,
) -> RouterInputs:
    """Random inputs whose logits have variance one; with ``mask``, about a third of the tokens are padding."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    values = RouterInputs(
        x=normal(tokens, features).to(dtype),
        weight=normal(heads, experts, features) / max(features, 1) ** 0.5,
        bias=normal(heads, experts) if bias else None,
        selection_bias=0.1 * normal(heads, experts) if selection_bias else None,
        mask=torch.rand(tokens, generator=draw) < 2 / 3 if mask else None,
        dgates=normal(tokens, heads, experts),
        dsums=normal(heads, 1 + experts) / max(tokens, 1),
    )
    moved = {f.name: v.to(device) for f in fields(values) if (v := getattr(values, f.name)) is not None}
    return replace(values, **moved)
