"""Inputs of grouped LoRA, and its results from any backend."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from molora_kernels import grouped_lora, use_backend, use_form
from molora_kernels.backend import Backend
from molora_kernels.grouped_lora.dispatch import Form
from molora_kernels.testing import assert_within_budget


@dataclass(frozen=True)
class LoraCase:
    """Sizes; shape letters as in ``molora_kernels/grouped_lora/reference.py``."""

    T: int
    K: int
    N: tuple[int, ...]
    E: int
    r: int
    H: int
    """0: no gates"""
    chosen: int = 2
    bias: bool = False
    p: float = 0.0
    strided: bool = False
    """Inputs whose rows are not contiguous."""
    idle: bool = False
    """The last expert is chosen by no token."""
    base: bool = True
    """Without it, what the adapters add alone."""


CASES = [
    LoraCase(T=0, K=8, N=(8,), E=2, r=4, H=1),
    LoraCase(T=1, K=16, N=(24,), E=4, r=4, H=1, chosen=1),
    LoraCase(T=37, K=50, N=(20, 33), E=3, r=5, H=2, bias=True, p=0.1),
    LoraCase(T=70, K=64, N=(30, 8, 8), E=1, r=8, H=0, p=0.3),
    LoraCase(T=33, K=48, N=(17, 40), E=4, r=8, H=1, idle=True, strided=True),
    LoraCase(T=37, K=50, N=(20, 33), E=3, r=5, H=2, p=0.1, base=False),
    LoraCase(T=65, K=32, N=(40, 24), E=5, r=4, H=2, chosen=3),
    LoraCase(T=300, K=40, N=(70,), E=8, r=16, H=1, p=0.05),  # several splits of the tokens
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoraInputs:
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    gates: Tensor | None
    dys: list[Tensor]
    dropout_p: float
    dropout_seed: Tensor
    top_k: int | None

    def double(self) -> LoraInputs:
        def widened(value: object) -> object:
            if isinstance(value, list):
                return [widened(v) for v in value]
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        return replace(self, **{f.name: widened(getattr(self, f.name)) for f in fields(self)})


def lora_inputs(
    case: LoraCase,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    masters: torch.dtype = torch.float32,
    seed: int = 0,
) -> LoraInputs:
    """Random inputs; the gates of the experts that are not chosen are zero. ``masters`` is the adapters' dtype."""
    draw = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = (torch.randn(rows, columns, generator=draw) * scale).to(device, dtype)
        if not case.strided:
            return values
        apart = values.new_empty(rows, 2 * columns)
        apart[:, ::2] = values
        return apart[:, ::2]

    R, gates = case.E * case.r, None
    if case.H:
        gates = torch.rand(case.T, case.H, case.E, generator=draw) + 0.1
        if case.idle:
            gates[..., -1] = 0.0
        rank = gates.argsort(-1, descending=True).argsort(-1)
        gates = gates.where(rank < case.chosen, 0.0).to(device)
    return LoraInputs(
        x=normal(case.T, case.K, dtype),
        weights=[normal(n, case.K, dtype, case.K**-0.5) for n in case.N if case.base],
        biases=[normal(1, n, dtype)[0] for n in case.N] if case.bias else [],
        lora_a=[normal(R, case.K, masters, case.K**-0.5) for _ in case.N],
        lora_b=[normal(n, R, masters, R**-0.5) for n in case.N],
        gates=gates,
        dys=[normal(case.T, n, dtype) for n in case.N],
        dropout_p=case.p,
        dropout_seed=torch.tensor(2**40 + 7, device=device),
        top_k=min(case.chosen, case.E) if case.H else None,
    )


def results(inputs: LoraInputs, backend: Backend, form: Form = "dense") -> dict[str, Tensor]:
    """Outputs, and the gradients of everything that has one."""
    groups = range(len(inputs.lora_b))
    leaves = {"x": inputs.x, **({} if inputs.gates is None else {"gates": inputs.gates})}
    leaves |= {f"a{g}": inputs.lora_a[g] for g in groups} | {f"b{g}": inputs.lora_b[g] for g in groups}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    gates = leaves.get("gates")
    if gates is not None:  # what the gradient of a gate is that was not chosen differs between forms: not looked at
        gates = gates.where(gates != 0, 0.0)
    with use_backend(backend), use_form(form):
        outputs = grouped_lora(
            leaves["x"],
            inputs.weights,
            [leaves[f"a{g}"] for g in groups],
            [leaves[f"b{g}"] for g in groups],
            scaling=2.0,
            gates=gates,
            top_k=inputs.top_k,
            biases=inputs.biases,
            dropout_p=inputs.dropout_p,
            dropout_seed=inputs.dropout_seed,
            stream=1,
        )
        grads = torch.autograd.grad(outputs, list(leaves.values()), inputs.dys)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {f"y{g}": y.detach() for g, y in enumerate(outputs)} | named


def check(inputs: LoraInputs, backend: Backend, form: Form = "dense", given: LoraInputs | None = None) -> None:
    """Every result of the backend within twice the reference's error in the same dtype. ``given`` goes to the backend
    instead: the same values, elsewhere in memory.

    The floor is one rounding of what results are computed from: gradients of fp32 masters too are made of 16-bit
    products where x has 16 bits. In fp32 it is four, for chains of sums over few elements.
    """
    exact, eager = results(inputs.double(), "reference"), results(inputs, "reference")
    for name, actual in results(given or inputs, backend, form).items():
        roundings = 2 * torch.finfo(inputs.x.dtype).eps / torch.finfo(actual.dtype).eps
        fp32 = inputs.x.dtype == torch.float32
        assert_within_budget(actual, eager[name], exact[name], name, roundings=8 if fp32 else round(roundings))
