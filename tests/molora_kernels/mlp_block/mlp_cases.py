"""Inputs of the SwiGLU block, and its results from any backend."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from molora_kernels import Projection, Router, mlp_block, use_backend, use_form
from molora_kernels.backend import Backend
from molora_kernels.grouped_lora.dispatch import Form
from molora_kernels.testing import assert_within_budget


@dataclass(frozen=True)
class MlpCase:
    """Sizes: T tokens, K hidden, inner (intermediate) features, E experts of rank r, H routers."""

    T: int
    K: int
    inner: int
    E: int
    r: int
    H: int
    top_k: int = 2
    bias: bool = False
    p: float = 0.0
    mask: bool = True
    strided: bool = False


CASES = [
    MlpCase(T=0, K=8, inner=12, E=2, r=2, H=3),
    MlpCase(T=1, K=16, inner=24, E=4, r=4, H=1, top_k=1, mask=False),
    MlpCase(T=33, K=24, inner=41, E=3, r=5, H=3, bias=True, p=0.1),
    MlpCase(T=40, K=33, inner=20, E=4, r=4, H=1, p=0.3, strided=True),
    MlpCase(T=17, K=24, inner=40, E=1, r=8, H=0, bias=True),
    MlpCase(T=35, K=16, inner=24, E=40, r=2, H=3, top_k=3),  # routers too wide to ride along with the shrink
    MlpCase(T=60, K=24, inner=40, E=4, r=4, H=3),  # routers ride along with the experts' gradients
    MlpCase(T=33, K=24, inner=41, E=12, r=3, H=3),  # down's router rides along, those of gate and up do not
    MlpCase(T=33, K=24, inner=41, E=4, r=80, H=3),  # too many columns for routers to ride along, which are planes still
    MlpCase(T=280, K=20, inner=30, E=4, r=8, H=3, p=0.05),  # several splits of the tokens
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MlpInputs:
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    router_weights: list[Tensor]
    router_biases: list[Tensor]
    selection_biases: list[Tensor]
    mask: Tensor | None
    dropout_seed: Tensor
    dy: Tensor
    dsums: Tensor

    def double(self) -> MlpInputs:
        def widened(value: object) -> object:
            if isinstance(value, list):
                return [widened(v) for v in value]
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        return replace(self, **{f.name: widened(getattr(self, f.name)) for f in fields(self)})


def mlp_inputs(
    case: MlpCase, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> MlpInputs:
    """Random inputs. Which experts win for h must not hang on its last bits, which differ between backends: there the
    selection bias decides alone, in steps that no probability bridges."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draw) * scale).to(device, dtype)

    features = (case.K, case.K, case.inner)
    outputs = (case.inner, case.inner, case.K)
    R, H = case.E * case.r, case.H
    x = normal(case.T, 2 * case.K if case.strided else case.K, dtype=dtype)
    return MlpInputs(
        x=x[:, ::2] if case.strided else x,
        weights=[normal(n, k, dtype=dtype, scale=k**-0.5) for n, k in zip(outputs, features, strict=True)],
        biases=[normal(n, dtype=dtype) for n in outputs] if case.bias else [],
        lora_a=[normal(R, k, scale=k**-0.5) for k in features],
        lora_b=[normal(n, R, scale=R**-0.5) for n in outputs],
        router_weights=[normal(case.E, k, scale=k**-0.5) for k in features[:H]],
        router_biases=[normal(case.E) for _ in range(H)] if case.bias else [],
        selection_biases=[
            normal(case.E, scale=0.1) if n < 2 else 10.0 * torch.randperm(case.E, generator=draw).float().to(device)
            for n in range(H)
        ],
        mask=(torch.rand(case.T, generator=draw) < 0.7).to(device) if case.mask else None,
        dropout_seed=torch.tensor(-(2**40) + 9, device=device),
        dy=normal(case.T, case.K, dtype=dtype),
        dsums=normal(H, 1 + case.E, scale=1 / max(case.T, 1)),
    )


def results(i: MlpInputs, case: MlpCase, backend: Backend, form: Form = "dense") -> dict[str, Tensor]:
    """Outputs, and the gradients of everything that has one."""
    leaves = {"x": i.x}
    for name in ("lora_a", "lora_b", "router_weights", "router_biases"):
        leaves |= {f"{name}{n}": t for n, t in enumerate(getattr(i, name))}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    with use_backend(backend), use_form(form):
        out = mlp_block(
            leaves["x"],
            *(
                Projection(w, leaves[f"lora_a{n}"], leaves[f"lora_b{n}"], i.biases[n] if i.biases else None)
                for n, w in enumerate(i.weights)
            ),
            [
                Router(leaves[f"router_weights{n}"], leaves.get(f"router_biases{n}"), selection)
                for n, selection in enumerate(i.selection_biases)
            ],
            top_k=min(case.top_k, case.E),
            scaling=2.0,
            mask=i.mask,
            dropout_p=case.p,
            dropout_seed=i.dropout_seed,
        )
        outputs, upstream = [out.y, out.sums], [i.dy, i.dsums]
        if not case.H:
            outputs, upstream = outputs[:1], upstream[:1]
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    looked_at = {f"gates{n}": gates for n, gates in enumerate(out.gates)}
    return {"y": out.y.detach(), "sums": out.sums.detach(), "counts": out.counts} | looked_at | named


def check(inputs: MlpInputs, case: MlpCase, backend: Backend, form: Form = "dense") -> None:
    """Every result of the backend within twice the reference's error in the same dtype.

    The floor is that of grouped LoRA, for a chain of two: on few elements, eager's many roundings can cancel by luck.
    """
    exact, eager = results(inputs.double(), case, "reference"), results(inputs, case, "reference")
    for name, actual in results(inputs, case, backend, form).items():
        if not case.H and name in ("sums", "counts"):
            continue
        roundings = 4 * torch.finfo(inputs.x.dtype).eps / torch.finfo(actual.dtype).eps
        fp32 = inputs.x.dtype == torch.float32
        assert_within_budget(actual, eager[name], exact[name], name, roundings=8 if fp32 else round(roundings))
