"""The SwiGLU block with routed experts beside its frozen base and every peer that is here.

All variants compute on the same x, frozen weights, experts and routers, in one run, interleaved. Each is compared with
its definition in fp64 before anything is timed; one that is wrong is reported as wrong and gets no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import molora_kernels as mk
from bench import check, measure, peers, record, variants
from bench.arguments import add_run, add_shape
from bench.machine import Roofline, roofline
from bench.measure import Variant
from bench.problem import DTYPES, Problem, Shape, problem
from bench.variants import Build
from molora_kernels.grouped_lora.dispatch import form_for
from molora_kernels.mlp_block import cost

BASE = "frozen base"


def _as_given(p: Problem) -> Problem:
    return p


@dataclass(frozen=True)
class Entry:
    """A way to compute a block, and what it is held to."""

    build: Build
    exact: Build = variants.reference
    """Its definition; run in fp64."""
    eager: Build = variants.naive
    """Its definition in plain PyTorch; run in the variant's own dtype, it says how large an error may be."""
    prepare: Callable[[Problem], Problem] = _as_given
    """The problem that it solves: the given one, or one with other adapters."""
    optional: bool = False
    """It may be unable to run here."""


def _other(build: Build, exact: Build, prepare: Callable[[Problem], Problem] = _as_given) -> Entry:
    return Entry(build, exact, exact, prepare, optional=True)


def _single(rank: int) -> Callable[[Problem], Problem]:
    return lambda p: p.single(rank, p.x.dtype)


ENTRIES: dict[str, Entry] = {
    BASE: Entry(variants.frozen, variants.frozen, variants.frozen),
    "transformers LlamaMLP": Entry(variants.unpatched, variants.frozen, variants.frozen),
    "molora": Entry(variants.molora),
    "molora dense": Entry(variants.molora_in_form("dense")),
    "molora grouped": Entry(variants.molora_in_form("grouped")),
    "naive loop": Entry(variants.naive),
    "loop with index_select": Entry(variants.selecting),
    "dense eager": Entry(variants.dense_eager),
    "dense torch.compile": Entry(variants.compiled, optional=True),
    "PEFT LoRA r=64": _other(peers.peft(64), variants.single, _single(64)),
    "PEFT LoRA r=128": _other(peers.peft(128), variants.single, _single(128)),
    "eulerforge": Entry(peers.eulerforge, prepare=Problem.narrow, optional=True),
    "mixlora": _other(peers.mixlora, variants.gated_blocks),
    "moe-peft": _other(peers.moe_peft, variants.gated_blocks),
    "Unsloth LoRA r=64": _other(peers.unsloth(64), variants.single, _single(64)),
    "Unsloth LoRA r=128": _other(peers.unsloth(128), variants.single, _single(128)),
}


# --- correctness -------------------------------------------------------------------------------------------------

CHECKED_TOKENS = 2048
"""At most; fp64 takes its time. With few tokens other code would be checked than what is timed: another form, and
passes that are not compiled."""
UNDECIDED = 0.05
"""Tokens whose k-th and (k+1)-th logits are closer than this are left out of the check: the rounding of 16-bit
activations may route them either way, and then two right answers differ by an expert."""


def fault(name: str, shape: Shape) -> str | None:
    """What is wrong with a variant, or None. Raises :class:`peers.Absent` for one that cannot run here.

    Peers draw their own dropout and are compared without it. molora's masks can be drawn again, so it is compared with
    the dropout that is measured.
    """
    entry, small = ENTRIES[name], replace(shape, tokens=min(shape.tokens, CHECKED_TOKENS))
    without = replace(small, dropout=0.0)
    drops = small if name.startswith("molora") else without
    found = _running(entry, lambda: _results(entry.build, _given(without), drops, _keep(without)))
    exact = _exact(entry.exact, entry.prepare, drops)
    return check.fault(found, exact, _allowed(entry.exact, entry.eager, entry.prepare, without), shape.torch_dtype)


def _results(build: Build, p: Problem, shape: Shape, keep: Tensor) -> check.Results:
    torch.manual_seed(shape.seed)  # a dropout seed is drawn from here, the same for a variant and its definition
    return check.results(build(p, shape), p.x, p.dy, keep=keep)


@lru_cache(maxsize=1)  # drawn once for all variants and definitions
def _given(without: Shape) -> Problem:
    return problem(without)


@lru_cache(maxsize=1)
def _keep(without: Shape) -> Tensor:
    return decided(_given(without).to(torch.float64), without.top_k)


@lru_cache(maxsize=8)  # as many definitions as there are; fp64 takes its time at a model's true size
def _exact(build: Build, prepare: Callable[[Problem], Problem], shape: Shape) -> check.Results:
    without = replace(shape, dropout=0.0)
    return _results(build, prepare(_given(without)).to(torch.float64), shape, _keep(without))


@lru_cache(maxsize=8)
def _allowed(exact: Build, eager: Build, prepare: Callable[[Problem], Problem], without: Shape) -> dict[str, float]:
    found = _results(eager, prepare(_given(without)), without, _keep(without))
    return check.errors(found, _exact(exact, prepare, without))


def _running(entry: Entry, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except peers.Absent:
        raise
    except Exception as error:  # an optional peer may fail in any way; a reason is what we owe
        if not entry.optional:
            raise
        text = str(error).strip().splitlines() or [""]
        raise peers.Absent(f"it does not run here: {type(error).__name__}: {text[0][:120]}") from error


@torch.no_grad()
def decided(exact: Problem, top_k: int) -> Tensor:
    """(T,) bool: no router of the block is near a tie between the last expert chosen and the first left out."""
    everyone = torch.ones(len(exact.x), dtype=torch.bool, device=exact.x.device)
    if top_k == len(exact.routers[0].weight):
        return everyone
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
    for x, router in zip(inputs, exact.routers, strict=True):
        ordered = F.linear(x, router.weight, router.bias).sort(dim=-1, descending=True).values
        everyone &= ordered[:, top_k - 1] - ordered[:, top_k] > UNDECIDED
    return everyone


# --- floors ------------------------------------------------------------------------------------------------------


def floors(shape: Shape, machine: Roofline) -> dict[str, float]:
    """What the block can cost over its frozen base, at best, as ``ratio`` has it: by arithmetic alone with all experts
    computed and with the chosen ones only, and by the roofline of this machine for each form."""
    sizes = (shape.tokens, shape.hidden, shape.intermediate, shape.experts * shape.rank)
    found = {}
    for arithmetic, form, top_k in (("flops_dense", "dense", None), ("flops_sparse", "grouped", shape.top_k)):
        parts = [
            count(*sizes, heads=3, experts=shape.experts, itemsize=shape.itemsize, top_k=top_k)
            for count in (cost.forward, cost.backward)
        ]
        flops = sum(part.adapter_flops for part in parts) / sum(part.base_flops for part in parts)
        base_ms = sum(machine.ms(part.base_flops, part.base_bytes) for part in parts)
        adapter_ms = sum(machine.ms(part.adapter_flops, part.adapter_bytes) for part in parts)
        found |= {arithmetic: round(1 + flops, 4), f"roofline_{form}": round(1 + adapter_ms / base_ms, 4)}
    return found


# --- the command -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, Shape(), dtype=DTYPES)
    add_run(parser)
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), help="beside the frozen base")


def run(options: argparse.Namespace) -> int:
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    torch.set_num_threads(options.threads)
    result = measured(shape, options.only, options.rounds, options.warmup)
    record.show(f"MLP block, {shape.dtype}, {shape.tokens} tokens, {shape.device}", result)
    if options.json:
        record.write(options.json, {"op": "mlp", "threads": options.threads, **result})
    return 1 if result["wrong"] else 0


def measured(shape: Shape, only: Sequence[str] | None, rounds: int, warmup: int) -> dict[str, Any]:
    """Check, then time: the part of a result that is about one shape."""
    p = problem(shape)
    built: dict[str, Variant] = {}
    absent: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name, entry in ENTRIES.items():
        if only and name not in (BASE, *only):
            continue
        try:
            found = fault(name, shape)
            if found:
                wrong[name] = found
            else:
                built[name] = entry.build(p, shape)
        except peers.Absent as reason:
            absent[name] = str(reason)
    machine = roofline(p.x.device, shape.torch_dtype, repeats=rounds)
    rows = []
    if BASE in built:  # without the base there is no ratio
        rows = measure.rows(built, p.x, p.dy, p.weights(), base=BASE, rounds=rounds, warmup=warmup)
    return {
        "shape": asdict(shape),
        "base": BASE,
        "chosen_form": form_for(p.x, shape.experts, shape.top_k, shape.rank),
        "rounds": rounds,
        "rows": rows,
        "not_measured": absent,
        "wrong": wrong,
        "roofline": asdict(machine),
        "floors": floors(shape, machine),
    }
