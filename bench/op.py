"""Router and grouped LoRA alone: time beside the bytes and FLOPs that their ``cost.py`` counts, and the share of this
machine's roofline that they reach.

Shape letters: T tokens, K input features, N output features, G projections, E experts, H gate sets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import molora_kernels as mk
from bench import check, measure, record
from bench.arguments import add_run, add_shape
from bench.machine import Roofline, roofline
from bench.measure import Variant
from bench.mlp import CHECKED_TOKENS
from bench.problem import DTYPES, Problem, Shape, problem
from molora_kernels.grouped_lora import cost as grouped_cost
from molora_kernels.router import cost as router_cost


class Part(NamedTuple):
    """What a forward or a backward costs."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Inputs:
    """What an operation reads; the same for all ways to compute it."""

    x: Tensor
    upstream: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    """Frozen (N, K) of grouped LoRA; none for the router."""
    leaves: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Inputs:
        def copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad) for t in tensors)

        return Inputs(self.x.to(dtype), copies(self.upstream), copies(self.weights), copies(self.leaves))


Forward = Callable[[Inputs], Callable[[Tensor], Any]]


@dataclass(frozen=True)
class Case:
    """An operation at a shape: ``inputs(tokens)``, ways to compute it, and what ours cost."""

    inputs: Callable[[int], Inputs]
    ways: dict[str, Forward]
    """The first is what ratios are over."""
    exact: Forward
    eager: str
    """The way whose error says how large one may be."""
    outputs: tuple[str, ...]
    kinds: tuple[str, ...]
    """Of the leaves."""
    costs: dict[str, tuple[Part, Part]]
    """Of ways, forward and backward."""


def variant(case: Case, way: Forward, inputs: Inputs) -> Variant:
    def named(gradients: list[Tensor]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for kind, leaf, gradient in zip(case.kinds, inputs.leaves, gradients, strict=True):
            if kind == "dgates":  # the gradient of a gate that was not chosen differs between forms, and is not used
                gradient = gradient.where(leaf != 0, 0.0)
            found.setdefault(kind, []).append(gradient)
        return found

    return Variant(way(inputs), list(inputs.leaves), named)


# --- the operations ----------------------------------------------------------------------------------------------


def router_case(shape: Shape) -> Case:
    """The two routers that read the block's input."""

    def inputs(tokens: int) -> Inputs:
        p = problem(replace(shape, tokens=tokens))
        weight, bias = (torch.stack([t.detach() for t in ts]) for ts in zip(*_two_routers(p), strict=True))
        draw = torch.Generator(p.x.device).manual_seed(shape.seed + 1)
        upstream = tuple(
            torch.randn(*size, generator=draw, device=p.x.device)
            for size in ((tokens, 2, shape.experts), (2, 1 + shape.experts))
        )
        return Inputs(p.x, upstream, (), (weight.requires_grad_(), bias.requires_grad_()))

    def molora(i: Inputs) -> Callable[[Tensor], Any]:
        return lambda x: mk.router(x, *i.leaves, top_k=shape.top_k)[:2]

    def eager(i: Inputs) -> Callable[[Tensor], Any]:
        def forward(x: Tensor) -> Any:
            weight, bias = i.leaves
            logits = torch.einsum("tk,hek->the", x.to(weight.dtype), weight) + bias
            probs = torch.softmax(logits, dim=-1)
            best = probs.topk(shape.top_k, dim=-1)
            chosen = best.values if shape.top_k == 1 else best.values / best.values.sum(-1, keepdim=True)
            gates = torch.zeros_like(probs).scatter(-1, best.indices, chosen)
            torch.zeros_like(probs).scatter(-1, best.indices, 1.0).sum(0)  # counts: part of the work, no gradient
            return gates, torch.cat([logits.logsumexp(-1).square().sum(0)[:, None], probs.sum(0)], dim=1)

        return forward

    sizes = (shape.tokens, shape.hidden, 2, shape.experts)
    forward, backward = (
        Part(*router_cost.bytes_and_flops(*sizes, x_bytes=shape.itemsize, backward=back)) for back in (False, True)
    )
    return Case(
        inputs, {"eager router": eager, "molora": molora}, _by_reference(molora), "eager router", ("gates", "sums"),
        ("dW", "db"), {"molora": (forward, backward)},
    )  # fmt: skip


def _two_routers(p: Problem) -> list[tuple[Tensor, Tensor]]:
    return [(r.weight, r.bias) for r in p.routers[:2] if r.bias is not None]


def grouped_case(shape: Shape, features: int, outputs: tuple[int, ...], *, routed: bool) -> Case:
    """Projections of one input, with E experts and their gates, or with a plain LoRA of the same rank."""
    experts = shape.experts if routed else 1
    total, count, scaling = experts * shape.rank, len(outputs), 2.0

    def inputs(tokens: int) -> Inputs:
        device, dtype = torch.device(shape.device), shape.torch_dtype
        draw = torch.Generator(device).manual_seed(shape.seed)

        def normal(*size: int, std: float = 1.0, to: torch.dtype = torch.float32) -> Tensor:
            return (torch.randn(*size, generator=draw, device=device) * std).to(to)

        lora_a = [normal(total, features, std=features**-0.5) for _ in outputs]
        lora_b = [normal(n, total, std=total**-0.5) for n in outputs]
        x = normal(tokens, features, to=dtype)
        gates = []
        if routed:
            weight = normal(count, experts, features, std=features**-0.5)
            gates = [mk.router(x, weight, top_k=shape.top_k).gates.detach()]
        return Inputs(
            x,
            tuple(normal(tokens, n, to=dtype) for n in outputs),
            tuple(normal(n, features, std=features**-0.5, to=dtype) for n in outputs),
            tuple(leaf.requires_grad_() for leaf in (*lora_a, *lora_b, *gates)),
        )

    def parts(i: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        return i.leaves[:count], i.leaves[count : 2 * count], i.leaves[2 * count] if routed else None

    def frozen(i: Inputs) -> Callable[[Tensor], Any]:
        return lambda x: tuple(F.linear(x, weight) for weight in i.weights)

    def molora(i: Inputs) -> Callable[[Tensor], Any]:
        a, b, gates = parts(i)
        return lambda x: mk.grouped_lora(x, i.weights, a, b, scaling=scaling, gates=gates)

    def grouped(i: Inputs) -> Callable[[Tensor], Any]:
        a, b, gates = parts(i)

        def forward(x: Tensor) -> Any:
            with mk.use_form("grouped"):
                return mk.grouped_lora(x, i.weights, a, b, scaling=scaling, gates=gates, top_k=shape.top_k)

        return forward

    def eager(i: Inputs) -> Callable[[Tensor], Any]:
        lora_a, lora_b, gates = parts(i)

        def forward(x: Tensor) -> Any:
            ys = []
            for g, (weight, a, b) in enumerate(zip(i.weights, lora_a, lora_b, strict=True)):
                s = scaling * F.linear(x, a.to(x.dtype))
                if gates is not None:
                    s = s * gates[:, g].to(x.dtype).repeat_interleave(shape.rank, dim=1)
                ys.append(F.linear(x, weight) + F.linear(s, b.to(x.dtype)))
            return tuple(ys)

        return forward

    def cost(top_k: int | None) -> tuple[Part, Part]:
        sizes: dict[str, Any] = dict(heads=count if routed else 0, experts=experts, itemsize=shape.itemsize)
        forward, backward = (
            of(shape.tokens, features, outputs, count * total, top_k=top_k, **sizes)
            for of in (grouped_cost.forward, grouped_cost.backward)
        )
        return (
            Part(forward.base_bytes + forward.adapter_bytes, forward.base_flops + forward.adapter_flops),
            Part(backward.base_bytes + backward.adapter_bytes, backward.base_flops + backward.adapter_flops),
        )

    ways, costs = {"frozen linears": frozen, "molora": molora}, {"molora": cost(None)}
    if routed and shape.top_k < experts:
        ways["molora grouped"], costs["molora grouped"] = grouped, cost(shape.top_k)
    return Case(
        inputs,
        {**ways, "dense eager": eager},
        _by_reference(molora),
        "dense eager",
        tuple(f"y{g}" for g in range(count)),
        ("dA",) * count + ("dB",) * count + ("dgates",) * routed,
        costs,
    )


def _by_reference(way: Forward) -> Forward:
    def build(i: Inputs) -> Callable[[Tensor], Any]:
        def forward(x: Tensor) -> Any:
            with mk.use_backend("reference"):
                return way(i)(x)

        return forward

    return build


def cases(shape: Shape) -> dict[str, Case]:
    key_value = shape.hidden // 4
    return {
        "router": router_case(shape),
        "gate/up": grouped_case(shape, shape.hidden, (shape.intermediate,) * 2, routed=True),
        "down": grouped_case(shape, shape.intermediate, (shape.hidden,), routed=True),
        "q/k/v": grouped_case(shape, shape.hidden, (shape.hidden, key_value, key_value), routed=False),
    }


# --- the command -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, Shape(), without=["dropout"], dtype=DTYPES)
    add_run(parser)


def run(options: argparse.Namespace) -> int:
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape()) if name != "dropout"})
    torch.set_num_threads(options.threads)
    machine = roofline(torch.device(shape.device), shape.torch_dtype, repeats=options.rounds)
    found = {
        name: measured(case, shape, machine, options.rounds, options.warmup) for name, case in cases(shape).items()
    }
    for name, result in found.items():
        record.show(f"{name}, {shape.dtype}, {shape.tokens} tokens, {shape.device}", result)
    if options.json:
        what = {"op": "op", "shape": asdict(shape), "threads": options.threads, "roofline": asdict(machine)}
        record.write(options.json, {**what, "rounds": options.rounds, "cases": found})
    return 1 if any(result["wrong"] for result in found.values()) else 0


def measured(case: Case, shape: Shape, machine: Roofline, rounds: int, warmup: int) -> dict[str, Any]:
    base = next(iter(case.ways))
    wrong = faults(case, shape)
    inputs = case.inputs(shape.tokens)
    built = {
        name: variant(case, way, inputs) if name != "frozen linears" else Variant(way(inputs), [], lambda _: {})
        for name, way in case.ways.items()
        if name not in wrong
    }
    rows = []
    if base in built:
        rows = measure.rows(built, inputs.x, inputs.upstream, inputs.weights, base=base, rounds=rounds, warmup=warmup)
    for row in rows:
        if (costs := case.costs.get(row["variant"])) is not None:
            row["gflop"] = [round(1e-9 * part.flops, 3) for part in costs]
            row["gbyte"] = [round(1e-9 * part.bytes, 4) for part in costs]
            least = [machine.ms(part.flops, part.bytes) for part in costs]
            row["floor_ms"] = [round(ms, 3) for ms in least]
            row["spent"] = measure.spent(built[row["variant"]], inputs.x, inputs.upstream)
            row["share"] = [round(ms / row[part], 3) for ms, part in zip(least, ("fwd_ms", "bwd_ms"), strict=True)]
    return {"base": base, "rows": rows, "not_measured": {}, "wrong": wrong}


def faults(case: Case, shape: Shape) -> dict[str, str]:
    """What is wrong with the ways that are wrong."""
    small = case.inputs(min(shape.tokens, CHECKED_TOKENS))

    def results(way: Forward, inputs: Inputs) -> check.Results:
        return check.results(variant(case, way, inputs), inputs.x, inputs.upstream, case.outputs)

    exact = results(case.exact, small.to(torch.float64))
    allowed = check.errors(results(case.ways[case.eager], small), exact)
    found = {}
    for name, way in case.ways.items():
        of_it, most = results(way, small), allowed
        if name == "frozen linears":  # without experts, so that it is its own definition
            wanted = results(way, small.to(torch.float64))
            most = check.errors(of_it, wanted)
        else:
            wanted = exact
        found[name] = check.fault(of_it, wanted, most, shape.torch_dtype)
    return {name: what for name, what in found.items() if what}
