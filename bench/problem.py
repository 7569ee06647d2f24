"""The SwiGLU block that is measured: its shape, its frozen weights, experts, routers, input and upstream gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import molora_kernels as mk
from bench.arguments import check_top_k

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """What is multiplied. Defaults: the shapes of the CPU goals."""

    tokens: int = 2048
    hidden: int = 1024
    intermediate: int = 2816
    experts: int = 4
    top_k: int = 2
    rank: int = 32
    dropout: float = 0.0
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check_top_k(self.top_k, self.experts)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize


@dataclass
class Problem:
    """Inputs in the shape's dtype; experts and routers are fp32 masters."""

    x: Tensor
    dy: Tensor
    projections: list[mk.Projection]
    routers: list[mk.Router]
    scaling: float

    def leaves(self) -> list[Tensor]:
        experts = [t for p in self.projections for t in (p.lora_a, p.lora_b)]
        return experts + [t for r in self.routers for t in (r.weight, r.bias) if t is not None]

    def named(self, gradients: list[Tensor]) -> dict[str, list[Tensor]]:
        """Gradients of :meth:`leaves` by kind. A router's bias is one more column of its weight: one matrix, one
        norm."""
        experts, routers = gradients[:6], gradients[6:]
        return {
            "dA": experts[0::2],
            "dB": experts[1::2],
            "d router": [torch.cat([w, b[:, None]], dim=1) for w, b in zip(routers[0::2], routers[1::2], strict=True)],
        }

    def weights(self) -> list[Tensor]:
        return [p.weight for p in self.projections]

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy with every tensor in ``dtype``: the reference's input. On the same device, whose generator the
        reference's dropout seed is drawn from."""

        def copy(t: Tensor) -> Tensor:
            return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

        return Problem(
            copy(self.x),
            copy(self.dy),
            [mk.Projection(copy(p.weight), copy(p.lora_a), copy(p.lora_b)) for p in self.projections],
            [mk.Router(copy(r.weight), None if r.bias is None else copy(r.bias)) for r in self.routers],
            self.scaling,
        )

    def narrow(self) -> Problem:
        """The same with experts and routers rounded to x's dtype, for peers that keep no fp32 masters."""

        def copy(t: Tensor) -> Tensor:
            return t.detach().to(self.x.dtype).requires_grad_()

        return replace(
            self,
            projections=[p._replace(lora_a=copy(p.lora_a), lora_b=copy(p.lora_b)) for p in self.projections],
            routers=[mk.Router(copy(r.weight), None if r.bias is None else copy(r.bias)) for r in self.routers],
        )

    def single(self, rank: int, dtype: torch.dtype) -> Problem:
        """The same block with one plain LoRA of ``rank`` on each projection, in ``dtype``."""
        device = self.x.device
        draw = torch.Generator(device).manual_seed(rank)

        def normal(rows: int, columns: int) -> Tensor:
            values = torch.randn(rows, columns, generator=draw, device=device) * max(rows, columns) ** -0.5
            return values.to(dtype).requires_grad_()

        made = [mk.Projection(w, normal(rank, w.shape[1]), normal(w.shape[0], rank)) for w in self.weights()]
        return replace(self, projections=made, routers=[])


def problem(shape: Shape) -> Problem:
    device, dtype = torch.device(shape.device), shape.torch_dtype
    generator = torch.Generator(device).manual_seed(shape.seed)  # a CPU's takes seconds for a GPU's sizes
    hidden, inner, rank = shape.hidden, shape.intermediate, shape.experts * shape.rank

    def normal(*size: int, std: float, to: torch.dtype, train: bool = False) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * std).to(to).requires_grad_(train)

    def projection(n: int, k: int) -> mk.Projection:
        return mk.Projection(
            normal(n, k, std=k**-0.5, to=dtype),
            normal(rank, k, std=k**-0.5, to=torch.float32, train=True),
            normal(n, rank, std=rank**-0.5, to=torch.float32, train=True),
        )

    def router(k: int) -> mk.Router:
        weight = normal(shape.experts, k, std=k**-0.5, to=torch.float32, train=True)
        return mk.Router(weight, torch.zeros(shape.experts, device=device, requires_grad=True))

    return Problem(
        x=normal(shape.tokens, hidden, std=1.0, to=dtype),
        dy=normal(shape.tokens, hidden, std=1.0, to=dtype),
        projections=[projection(inner, hidden), projection(inner, hidden), projection(hidden, inner)],
        routers=[router(hidden), router(hidden), router(inner)],
        scaling=2.0,
    )
