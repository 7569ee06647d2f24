"""The SwiGLU block with routed experts beside its frozen base and every peer that is here.

All variants compute on the same x, frozen weights, experts and routers, in one run, interleaved. Each is compared with
the fp64 reference before anything is timed; one that is wrong is reported as wrong and gets no time.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import molora_kernels as mk
from bench import measure, report
from bench.measure import Variant


@dataclass(frozen=True)
class Shape:
    """What is multiplied. Defaults: the CPU goal's shapes."""

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

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]


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

    def weights(self) -> list[Tensor]:
        return [p.weight for p in self.projections]

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy with every tensor in ``dtype``, on the CPU: the reference's input."""

        def copy(t: Tensor) -> Tensor:
            return t.detach().cpu().to(dtype).requires_grad_(t.requires_grad)

        return Problem(
            copy(self.x),
            copy(self.dy),
            [mk.Projection(copy(p.weight), copy(p.lora_a), copy(p.lora_b)) for p in self.projections],
            [mk.Router(copy(r.weight), None if r.bias is None else copy(r.bias)) for r in self.routers],
            self.scaling,
        )


def problem(shape: Shape) -> Problem:
    generator = torch.Generator().manual_seed(shape.seed)
    device, dtype = torch.device(shape.device), shape.torch_dtype
    hidden, inner, rank = shape.hidden, shape.intermediate, shape.experts * shape.rank

    def normal(*size: int, std: float, to: torch.dtype, train: bool = False) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(device, to).requires_grad_(train)

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


# --- variants ----------------------------------------------------------------------------------------------------


def frozen(p: Problem, shape: Shape) -> Variant:
    """The block of transformers with frozen weights: what a step costs without adapters."""
    gate, up, down = p.weights()
    return Variant(lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), [])


def molora(p: Problem, shape: Shape) -> Variant:
    """``mlp_block`` on the backend that its device has."""
    gate, up, down = p.projections

    def forward(x: Tensor) -> Tensor:
        seed = mk.new_dropout_seed(x.device) if shape.dropout else None
        return mk.mlp_block(
            x, gate, up, down, p.routers, top_k=shape.top_k, scaling=p.scaling,
            dropout_p=shape.dropout, dropout_seed=seed,
        ).y  # fmt: skip

    return Variant(forward, p.leaves())


def _gates(x: Tensor, router: mk.Router, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates and indices (T, k) of the chosen experts, as a mixture-of-experts layer in eager PyTorch computes them."""
    probs = torch.softmax(F.linear(x.float(), router.weight, router.bias), dim=-1)
    best = probs.topk(top_k, dim=-1)
    return best.values / best.values.sum(-1, keepdim=True), best.indices


def _block(p: Problem, project: Callable[[Tensor, mk.Projection, mk.Router], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        (gate, up, down), (gate_router, up_router, down_router) = p.projections, p.routers
        h = F.silu(project(x, gate, gate_router)) * project(x, up, up_router)
        return project(h, down, down_router)

    return forward


def naive(p: Problem, shape: Shape) -> Variant:
    """The loop that people write: every expert on every token, weighted by its gate."""

    def project(x: Tensor, q: mk.Projection, router: mk.Router) -> Tensor:
        gates, indices = _gates(x, router, shape.top_k)
        weights = torch.zeros(x.shape[0], shape.experts, device=x.device).scatter(1, indices, gates).to(x.dtype)
        dropped = F.dropout(x, shape.dropout)
        y = F.linear(x, q.weight)
        for e in range(shape.experts):
            a = q.lora_a[e * shape.rank : (e + 1) * shape.rank].to(x.dtype)
            b = q.lora_b[:, e * shape.rank : (e + 1) * shape.rank].to(x.dtype)
            y = y + p.scaling * F.linear(F.linear(dropped, a), b) * weights[:, e : e + 1]
        return y

    return Variant(_block(p, project), p.leaves())


def selecting(p: Problem, shape: Shape) -> Variant:
    """The loop with ``index_select``: each expert on its own tokens, results added back in place."""

    def project(x: Tensor, q: mk.Projection, router: mk.Router) -> Tensor:
        gates, indices = _gates(x, router, shape.top_k)
        dropped = F.dropout(x, shape.dropout)
        y = F.linear(x, q.weight)
        for e in range(shape.experts):
            token, slot = (indices == e).nonzero(as_tuple=True)
            a = q.lora_a[e * shape.rank : (e + 1) * shape.rank].to(x.dtype)
            b = q.lora_b[:, e * shape.rank : (e + 1) * shape.rank].to(x.dtype)
            out = F.linear(F.linear(dropped.index_select(0, token), a), b)
            y = y.index_add(0, token, out * (p.scaling * gates[token, slot, None]).to(x.dtype))
        return y

    return Variant(_block(p, project), p.leaves())


def dense_eager(p: Problem, shape: Shape) -> Variant:
    """molora's algorithm, experts concatenated and gates as a mask, left to autograd."""

    def project(x: Tensor, q: mk.Projection, router: mk.Router) -> Tensor:
        gates, indices = _gates(x, router, shape.top_k)
        weights = torch.zeros(x.shape[0], shape.experts, device=x.device).scatter(1, indices, gates * p.scaling)
        s = F.linear(F.dropout(x, shape.dropout), q.lora_a.to(x.dtype))
        s = s * weights.to(x.dtype).repeat_interleave(shape.rank, dim=1)
        return F.linear(x, q.weight) + F.linear(s, q.lora_b.to(x.dtype))

    return Variant(_block(p, project), p.leaves())


def compiled(p: Problem, shape: Shape) -> Variant:
    """The dense form through ``torch.compile``."""
    eager = dense_eager(p, shape)
    return Variant(torch.compile(eager.forward), eager.leaves)


class _Mlp(nn.Module):
    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def peft(rank: int) -> Callable[[Problem, Shape], Variant]:
    """One plain LoRA of PEFT: no router, no experts, the price that people pay today."""

    def build(p: Problem, shape: Shape) -> Variant:
        from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports] # a peer, optional

        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=shape.dropout,
            target_modules=["gate_proj", "up_proj", "down_proj"],
        )
        module = inject_adapter_in_model(config, _Mlp(p.weights()))
        assert isinstance(module, nn.Module)
        return Variant(module, [q for q in module.parameters() if q.requires_grad])

    return build


VARIANTS: dict[str, Callable[[Problem, Shape], Variant]] = {
    "frozen base": frozen,
    "molora": molora,
    "naive loop": naive,
    "loop with index_select": selecting,
    "dense eager": dense_eager,
    "dense torch.compile": compiled,
    "PEFT LoRA r=64": peft(64),
    "PEFT LoRA r=128": peft(128),
}
SAME_MATHS = ("molora", "naive loop", "loop with index_select", "dense eager", "dense torch.compile")
"""Variants that compute the routed mixture, and are held to its reference; the others compute something else."""


# --- correctness -------------------------------------------------------------------------------------------------

UNDECIDED = 0.05
"""Tokens whose k-th and (k+1)-th logits are closer than this are left out of the check: the rounding of 16-bit
activations may route them either way, and then two right answers differ by an expert."""


def errors(variant: Variant, p: Problem, top_k: int) -> dict[str, float]:
    """Relative error ``|a - ref| / |ref|`` against the fp64 reference, the largest of each kind of tensor."""
    exact = p.to(torch.float64)
    decided = _decided(exact, top_k)
    dy = exact.dy * decided[:, None]
    x = exact.x.requires_grad_()
    y = _reference(exact, x, top_k)
    expected = [y[decided], *torch.autograd.grad(y, [x, *exact.leaves()], dy)]
    ours = p.x.detach().requires_grad_()
    out = variant.forward(ours)
    actual = [out[decided.to(out.device)], *torch.autograd.grad(out, [ours, *variant.leaves], dy.to(p.dy))]
    # A router's bias is one more column of its weight, so the two gradients are one matrix with one norm.
    kinds = ("y", "dx", *("dA", "dB") * 3, *("d router",) * 3)
    worst: dict[str, float] = {}
    for kind, a, b in zip(kinds, _with_bias(actual), _with_bias(expected), strict=True):
        error = ((a.detach().cpu().double() - b).norm() / b.norm()).item()
        worst[kind] = max(worst.get(kind, 0.0), error)
    return worst


def _with_bias(tensors: list[Tensor]) -> list[Tensor]:
    *others, w0, b0, w1, b1, w2, b2 = tensors
    return [*others, *(torch.cat([w, b[:, None]], dim=1) for w, b in ((w0, b0), (w1, b1), (w2, b2)))]


def _reference(exact: Problem, x: Tensor, top_k: int) -> Tensor:
    gate, up, down = exact.projections
    with mk.use_backend("reference"):
        return mk.mlp_block(x, gate, up, down, exact.routers, top_k=top_k, scaling=exact.scaling).y


@torch.no_grad()
def _decided(exact: Problem, top_k: int) -> Tensor:
    """(T,) bool: no router of the block is near a tie between the last expert chosen and the first left out."""
    gate, up, _ = exact.projections
    with mk.use_backend("reference"):
        gates = mk.router(exact.x, torch.stack([r.weight for r in exact.routers[:2]]), top_k=top_k).gates
        a, b = (
            mk.grouped_lora(
                exact.x, [q.weight], [q.lora_a], [q.lora_b], gates=gates[:, i : i + 1], scaling=exact.scaling
            )[0]
            for i, q in enumerate((gate, up))
        )
    inputs = (exact.x, exact.x, F.silu(a) * b)
    decided = torch.ones(len(exact.x), dtype=torch.bool)
    for x, router in zip(inputs, exact.routers, strict=True):
        ordered = F.linear(x, router.weight, router.bias).sort(dim=-1, descending=True).values
        decided &= ordered[:, top_k - 1] - ordered[:, top_k] > UNDECIDED
    return decided


def check(names: list[str], shape: Shape) -> dict[str, str]:
    """Names of wrong variants -> what is wrong. Allowed: twice the naive loop's error in the same dtype, per kind."""
    small = replace(shape, tokens=min(shape.tokens, 256), dropout=0.0)
    p = problem(small)
    allowed = errors(VARIANTS["naive loop"](p, small), p, small.top_k)
    wrong = {}
    for name in names:
        if name in SAME_MATHS and name != "naive loop":
            found = errors(VARIANTS[name](p, small), p, small.top_k)
            excess = {kind: found[kind] / allowed[kind] for kind in found}
            kind = max(excess, key=excess.__getitem__)
            if not excess[kind] <= 2:
                wrong[name] = f"its error in {kind} is {excess[kind]:.2f} times the naive loop's"
    return wrong


# --- the command -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="beside the frozen base")
    parser.add_argument("--json", metavar="FILE", help="write rows with provenance here")


def run(options: argparse.Namespace) -> int:
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    torch.set_num_threads(options.threads)
    p = problem(shape)
    built: dict[str, Variant] = {}
    absent: dict[str, str] = {}
    for name, build in VARIANTS.items():
        if options.only and name not in ("frozen base", *options.only):
            continue
        if name.startswith("PEFT") and importlib.util.find_spec("peft") is None:
            absent[name] = "peft is not installed"
            continue
        built[name] = build(p, shape)
    wrong = check(list(built), shape)
    absent |= wrong
    for name in wrong:
        del built[name]

    timings = measure.interleaved(built, p.x, p.dy, options.rounds, options.warmup)
    base = timings["frozen base"]
    rows = []
    for name, timing in timings.items():
        ratio, low, high = measure.median_ratio(timing.total, base.total)
        rows.append(
            {
                "variant": name,
                "fwd_ms": round(sorted(timing.forward)[len(timing.forward) // 2], 3),
                "bwd_ms": round(sorted(timing.backward)[len(timing.backward) // 2], 3),
                "total_ms": round(sorted(timing.total)[len(timing.total) // 2], 3),
                "ratio": round(ratio, 3),
                "ratio_quartiles": [round(low, 3), round(high, 3)],
                "saved_mib": round(measure.saved_mib(built[name], p.x, p.weights()), 1),
            }
        )
    report.show(f"MLP block, {shape.dtype}, {shape.tokens} tokens, {shape.device}", rows, absent)
    if options.json:
        report.write(options.json, {"op": "mlp", "shape": asdict(shape), "threads": options.threads}, rows, absent)
    return 1 if wrong else 0
