"""No time without this: a variant's outputs and gradients beside those of its definition in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bench.measure import Outputs, Variant, as_tuple, input_leaf

MOST = {torch.float32: 32.0, torch.bfloat16: 4.0, torch.float16: 4.0}
"""Relative error, in units in the last place, that eager PyTorch is believed: of a block up to Llama-3.2-3B's size it
makes at most 9.3 in fp32 and 1.4 in 16 bits. With more it is wrong itself, and all that is as wrong would pass."""
ALLOWED = 2
"""A variant may make so many times the error that its definition makes in eager PyTorch in the same dtype, plus half a
unit in the last place, should eager be exact by luck."""

Results = Mapping[str, Sequence[Tensor]]
"""Outputs and gradients by kind; fp64, on the CPU."""


def results(
    variant: Variant, x: Tensor, upstream: Outputs, outputs: Sequence[str] = ("y",), keep: Tensor | None = None
) -> Results:
    """What a variant computes from x: its outputs under the names given, dx, and its leaves' gradients by kind.

    ``keep`` (T,) bool: only these tokens' outputs are compared, and only they send a gradient back.
    """

    def kept(t: Tensor) -> Tensor:
        return t if keep is None else t * keep.to(t.device).view(-1, *[1] * (t.ndim - 1))

    for leaf in variant.leaves:
        leaf.grad = None
    leaf_x = input_leaf(x)
    y = variant.forward(leaf_x)
    variant.backward(y, tuple(kept(dy) for dy in as_tuple(upstream)))
    found = {name: [kept(t.detach())] for name, t in zip(outputs, as_tuple(y), strict=True)}
    if leaf_x.grad is not None:
        found["dx"] = [leaf_x.grad]
    found |= variant.named([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in variant.leaves])
    return {kind: [t.cpu().double() for t in tensors] for kind, tensors in found.items() if tensors}


def errors(found: Results, exact: Results) -> dict[str, float]:
    """Relative error ``|a - exact| / |exact|``, the largest of each kind."""
    assert found.keys() == exact.keys(), f"comparing {sorted(found)} with {sorted(exact)}"
    return {kind: max(_relative(a, b) for a, b in zip(found[kind], exact[kind], strict=True)) for kind in exact}


def _relative(a: Tensor, b: Tensor) -> float:
    error, size = (a - b).norm().item(), b.norm().item()
    return error / size if size else error


def fault(found: Results, exact: Results, allowed: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong with a variant, or None. ``allowed``: the errors that eager PyTorch makes, a variant itself."""
    unit = torch.finfo(dtype).eps
    most = {kind: ALLOWED * min(error, MOST[dtype] * unit) + unit / 2 for kind, error in allowed.items()}
    excess = {kind: error / most[kind] for kind, error in errors(found, exact).items()}
    worst = max(excess, key=lambda kind: math.inf if math.isnan(excess[kind]) else excess[kind])
    if excess[worst] <= 1:  # a NaN fails
        return None
    return f"its error in {worst} against fp64 is {excess[worst]:.2f} times what is allowed"
