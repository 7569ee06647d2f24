"""Time tiles that a kernel could have beside those it has, on the GPU at hand: where selectors' numbers come from.

Shapes are Llama-3.2-3B's with the recipe's experts. A candidate takes the place of what a selector returns (or of a
constant), the operation is launched through its own launcher, and what it gives is compared with what it gave before.
All candidates are compiled first, side by side, in processes of their own; then each is timed alone, with a flushed L2.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import record
from bench.arguments import add_shape, count, positive
from bench.problem import DTYPES, Shape

TILES = "molora_kernels.grouped_lora.tiles"
Candidate = dict[str, Any]
"""What is put in place of what: "module:name" to a value, which a function of that name then returns."""


DEFAULT = Shape(tokens=8192, hidden=3072, intermediate=8192, dtype="bf16", device="cuda")


@dataclass(frozen=True)
class Target:
    """An operation, ready to be launched, and what its kernels could run with."""

    prepare: Callable[[Shape], Callable[[], Any]]
    candidates: Callable[[], Iterator[Candidate]]


# --- operations --------------------------------------------------------------------------------------------------


def _normal(shape: Shape, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    draw = torch.Generator(shape.device).manual_seed(sum(size))
    made = torch.randn(*size, generator=draw, device=shape.device)
    return (made * size[-1] ** -0.5).to(dtype or shape.torch_dtype)


def _drop(shape: Shape) -> tuple[Tensor | None, float, int]:
    seed = torch.zeros(1, dtype=torch.int64, device=shape.device) if shape.dropout else None
    return seed, shape.dropout, 0


def _gates(shape: Shape, heads: int = 1) -> Tensor:
    gates = _normal(shape, shape.tokens, heads, shape.experts, dtype=torch.float32).softmax(-1)
    kept = gates.topk(shape.top_k, dim=-1)
    return torch.zeros_like(gates).scatter(-1, kept.indices, kept.values / kept.values.sum(-1, keepdim=True))


def _route_and_shrink(features: str, projections: int) -> Callable[[Shape], Callable[[], Any]]:
    def prepare(shape: Shape) -> Callable[[], Any]:
        from molora_kernels.grouped_lora import forward

        K, P = getattr(shape, features), projections * shape.experts * shape.rank
        x, a = _normal(shape, shape.tokens, K), _normal(shape, P, K)
        weight = _normal(shape, projections * shape.experts, K, dtype=torch.float32)
        weight = _for_routers(weight, len(weight), x.dtype)
        routers = forward.Routers(weight, None, None, None, shape.top_k)
        return lambda: forward.route_and_shrink(x, a, routers, projections, shape.experts, *_drop(shape))[0]

    return prepare


def _shrink(projections: int) -> Callable[[Shape], Callable[[], Any]]:
    def prepare(shape: Shape) -> Callable[[], Any]:
        from molora_kernels.grouped_lora import forward

        x, a = _normal(shape, shape.tokens, shape.hidden), _normal(shape, projections * shape.rank, shape.hidden)
        return lambda: forward.shrink(x, a, *_drop(shape))

    return prepare


def _weights(features: str, columns: Callable[[Shape], int], routers: int) -> Callable[[Shape], Callable[[], Any]]:
    def prepare(shape: Shape) -> Callable[[], Any]:
        from molora_kernels.grouped_lora import backward

        x, left = (_normal(shape, shape.tokens, n) for n in (getattr(shape, features), columns(shape)))
        Q, dlogits = routers * shape.experts, None
        if Q:
            dlogits = _for_routers(_normal(shape, shape.tokens, Q, dtype=torch.float32), Q, x.dtype)
        return lambda: backward.weight_terms(x, left, dlogits, *_drop(shape))[0].sum(0)

    return prepare


def _expands(features: str, projections: int) -> Callable[[Shape], Callable[[], Any]]:
    def prepare(shape: Shape) -> Callable[[], Any]:
        from molora_kernels.grouped_lora import backward

        dys = [_normal(shape, shape.tokens + i, getattr(shape, features))[i:] for i in range(projections)]
        gated = _normal(shape, shape.tokens, projections * _mixture(shape))
        return lambda: torch.stack([terms.sum(0) for terms in backward.expand_terms(dys, gated)])

    return prepare


def _input_grad(features: str, columns: Callable[[Shape], int], routers: int) -> Callable[[Shape], Callable[[], Any]]:
    def prepare(shape: Shape) -> Callable[[], Any]:
        from molora_kernels.grouped_lora import backward

        K, P, Q = getattr(shape, features), columns(shape), routers * shape.experts
        ds, a = _normal(shape, shape.tokens, P), _normal(shape, P, K)
        sizes = (shape.tokens, Q), (Q, K)
        dlogits, weight = (_for_routers(_normal(shape, *size, dtype=torch.float32), Q, a.dtype) for size in sizes)
        return lambda: backward.input_grad(ds, a, dlogits, weight, *_drop(shape))

    return prepare


def _for_routers(x: Tensor, Q: int, dtype: torch.dtype) -> Tensor:
    """fp32 as products with routers of Q logits take it."""
    from molora_kernels._triton.total import AS_PLANES, joined
    from molora_kernels.grouped_lora import tiles

    return joined([[x]], [AS_PLANES])[0] if tiles.as_planes(Q, dtype) else x


def _gate(projections: int, *, backward: bool) -> Callable[[Shape], Callable[[], Any]]:
    def prepare(shape: Shape) -> Callable[[], Any]:
        from molora_kernels.grouped_lora import gating, tiles

        s = _normal(shape, shape.tokens, projections * shape.experts * shape.rank)
        gates, dgated = _gates(shape, projections), torch.flip(s, [0])
        if not backward:
            return lambda: gating.gate(s, gates, projections, 2.0)
        as_planes = tiles.as_planes(projections * shape.experts, s.dtype)
        router = gating.RouterGrads(gates.log().clamp(min=-9), None, None, None, shape.top_k, as_planes)
        need = dict(need_ds=True, need_gated=True, need_dgates=True)
        return lambda: gating.gate_backward(dgated, s, gates, projections, 2.0, router=router, **need)[0]

    return prepare


def _swiglu(*, backward: bool) -> Callable[[Shape], Callable[[], Any]]:
    def prepare(shape: Shape) -> Callable[[], Any]:
        from molora_kernels.mlp_block import backward as block_backward
        from molora_kernels.mlp_block import forward as block_forward

        gate, up, dh = (_normal(shape, shape.tokens + i, shape.intermediate)[i:] for i in range(3))
        if not backward:
            return lambda: block_forward.swiglu(gate, up)
        return lambda: block_backward.swiglu_backward(gate, up, dh, need_h=True)[1]

    return prepare


def _grouped(what: str, features: str) -> Callable[[Shape], Callable[[], Any]]:
    """Of one projection: the shrink over ``features``, the expand to them, or an expert's weight gradient."""

    def prepare(shape: Shape) -> Callable[[], Any]:
        from molora_kernels.grouped_lora import grouped

        x = _normal(shape, shape.tokens, getattr(shape, features))
        a = _normal(shape, shape.experts * shape.rank, x.shape[1])
        s = _normal(shape, shape.tokens, shape.top_k * shape.rank)
        sets = grouped.sets_of_all(_gates(shape), shape.top_k, x.dtype)
        _ = sets[0].by_expert
        if what == "shrink":
            return lambda: grouped.shrink(x, [a], sets, *_drop(shape))
        if what == "expand":
            return lambda: grouped.input_grad(s, [a], sets, None, *_drop(shape))
        return lambda: grouped.shrink_terms(x, s, sets, 1, *_drop(shape))[0].sum(0)

    return prepare


# --- candidates --------------------------------------------------------------------------------------------------


def _tiles(selector: str, **choices: tuple[int, ...]) -> Callable[[], Iterator[Candidate]]:
    """Every combination of a selector's ``choices``, and of the module's constants among them (in capitals)."""

    def candidates() -> Iterator[Candidate]:
        from molora_kernels._triton.tiles import Tiles

        for values in itertools.product(*choices.values()):
            given = dict(zip(choices, values, strict=True))
            constants = {f"{TILES}:{name}": given.pop(name) for name in choices if name.isupper()}
            yield {f"{TILES}:{selector}": Tiles(**given), **constants}

    return candidates


def _elementwise() -> Iterator[Candidate]:
    from molora_kernels._triton.tiles import Tiles

    for block, warps in itertools.product((512, 1024, 2048, 4096), (4, 8)):
        settings = {"BLOCK": block, "TILES": Tiles(0, block, num_warps=warps)}
        modules = [f"molora_kernels.mlp_block.{side}" for side in ("forward", "backward")]
        yield {f"{module}:{name}": value for module in modules for name, value in settings.items()}


def _gate_rows() -> Iterator[Candidate]:
    from molora_kernels._triton.tiles import Tiles

    module = "molora_kernels.grouped_lora.gating"
    for rows, columns, warps in itertools.product((8, 16, 32), (64, 128), (4, 8)):
        tile = Tiles(rows, 0, columns, num_warps=warps)
        yield {
            f"{module}:GATE_ROWS": rows, f"{module}:GATE_COLUMNS": columns, f"{module}:BACKWARD_ROWS": rows,
            f"{module}:FORWARD_TILES": tile, f"{module}:BACKWARD_TILES": tile,
        }  # fmt: skip


def _mixture(shape: Shape) -> int:
    return shape.experts * shape.rank


WARPS, STAGES = (4, 8), (2, 3, 4)

TARGETS = {
    "route+shrink gate/up": Target(
        _route_and_shrink("hidden", 2),
        _tiles("shrink_tiles", block_t=(64, 128), block_k=(32, 64), block_n=(256,), num_warps=WARPS,
               num_stages=(3, 4, 5)),
    ),
    "route+shrink down": Target(
        _route_and_shrink("intermediate", 1),
        _tiles("shrink_tiles", block_t=(64, 128), block_k=(64, 128), block_n=(128,), num_warps=WARPS,
               num_stages=(3, 4, 5)),
    ),
    "shrink q/k/v": Target(
        _shrink(3),
        _tiles("shrink_tiles", block_t=(32, 64), block_k=(64, 128), block_n=(128,), num_warps=WARPS,
               num_stages=(3, 4, 5)),
    ),
    "shrink o": Target(
        _shrink(1),
        _tiles("shrink_tiles", block_t=(32, 64), block_k=(64, 128), block_n=(32,), num_warps=(4,),
               num_stages=(3, 4, 5)),
    ),
    "dA gate/up": Target(
        _weights("hidden", lambda s: 2 * _mixture(s), 2),
        _tiles("weight_tiles", block_t=(32, 64), block_k=(64, 128), block_n=(256,), num_warps=WARPS, num_stages=STAGES,
               FEW_SPLITS=(2, 5, 10)),
    ),
    "dA down": Target(
        _weights("intermediate", _mixture, 1),
        _tiles("weight_tiles", block_t=(32, 64, 128), block_k=(64, 128), block_n=(128,), num_warps=WARPS,
               num_stages=(2, 4), FEW_SPLITS=(2, 5, 10)),
    ),
    "dB gate/up": Target(
        _expands("intermediate", 2),
        _tiles("weight_tiles", block_t=(32, 64, 128), block_k=(64, 128), block_n=(128,), num_warps=WARPS,
               num_stages=(2, 4), FEW_SPLITS=(2, 5, 10)),
    ),
    "dB down": Target(
        _expands("hidden", 1),
        _tiles("weight_tiles", block_t=(64, 128), block_k=(64, 128), block_n=(128,), num_warps=WARPS,
               num_stages=(2, 4), FEW_SPLITS=(2, 5, 10)),
    ),
    "dA q/k/v": Target(
        _weights("hidden", lambda s: 3 * s.rank, 0),
        _tiles("weight_tiles", block_t=(64,), block_k=(64, 128), block_n=(128,), num_warps=WARPS, num_stages=(2, 4),
               FEW_SPLITS=(2, 5, 10)),
    ),
    "dx gate/up": Target(
        _input_grad("hidden", lambda s: 2 * _mixture(s), 2),
        _tiles("input_tiles", block_t=(64, 128), block_k=(64, 128, 256), block_n=(32, 64, 128), num_warps=WARPS,
               num_stages=(2, 3)),
    ),
    "dx down": Target(
        _input_grad("intermediate", _mixture, 1),
        _tiles("input_tiles", block_t=(64, 128), block_k=(64, 128, 256), block_n=(32, 64, 128), num_warps=WARPS,
               num_stages=(2, 3)),
    ),
    "gate": Target(_gate(2, backward=False), _gate_rows),
    "gate backward": Target(_gate(2, backward=True), _gate_rows),
    "swiglu": Target(_swiglu(backward=False), _elementwise),
    "swiglu backward": Target(_swiglu(backward=True), _elementwise),
    "grouped shrink": Target(
        _grouped("shrink", "hidden"),
        _tiles("set_shrink_tiles", block_t=(64,), block_k=(64, 128), block_n=(64,), num_warps=WARPS,
               num_stages=(2, 3, 4, 5)),
    ),
    "grouped expand": Target(
        _grouped("expand", "intermediate"),
        _tiles("set_expand_tiles", block_t=(64,), block_k=(64,), block_n=(64, 128, 256), num_warps=WARPS,
               num_stages=(1, 2)),
    ),
    "grouped dA": Target(
        _grouped("dA", "hidden"),
        _tiles("expert_weight_tiles", block_t=(64, 128), block_k=(64, 128), block_n=(32,), num_warps=WARPS,
               num_stages=(2, 4), EXPERT_PROGRAMS=(256, 512)),
    ),
}  # fmt: skip


@contextmanager
def _replaced(candidate: Candidate) -> Iterator[None]:
    before: list[tuple[Any, str, Any]] = []
    for path, value in candidate.items():
        module_name, name = path.split(":")
        module = importlib.import_module(module_name)
        before.append((module, name, getattr(module, name)))
        setattr(module, name, (lambda *_, value=value, **__: value) if callable(before[-1][2]) else value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _said(candidate: Candidate) -> str:
    """Without what is said twice."""
    parts: dict[str, str] = {}
    for path, value in candidate.items():
        fields = asdict(value) if hasattr(value, "__dataclass_fields__") else {path.split(":")[1]: value}
        parts |= {name: f"{name}={number}" for name, number in fields.items() if number}
    return " ".join(parts.values()) or "as it is"


# --- measuring ---------------------------------------------------------------------------------------------------


class _Watch:
    """Registers, spills and shared memory of the kernels that run, as the driver says."""

    def __enter__(self) -> _Watch:
        from triton.runtime.jit import JITFunction

        self.seen: dict[str, tuple[int, int, int]] = {}
        self._jit, self._run = JITFunction, JITFunction.run

        def run(function: Any, *args: Any, **given: Any) -> Any:
            kernel: Any = self._run(function, *args, **given)
            used = (getattr(kernel, "n_regs", 0) or 0, getattr(kernel, "n_spills", 0) or 0, kernel.metadata.shared)
            self.seen[function.fn.__name__] = used
            return kernel

        JITFunction.run = run  # pyright: ignore[reportAttributeAccessIssue] # put back on exit
        return self

    def __exit__(self, *_: object) -> None:
        self._jit.run = self._run  # pyright: ignore[reportAttributeAccessIssue] # its own


def _compiled(name: str, shape: Shape, candidate: Candidate) -> str:
    """Launch once, so that the cache on disk has it; why it cannot be, or nothing."""
    try:
        with _replaced(candidate):
            TARGETS[name].prepare(shape)()
            torch.cuda.synchronize()
    except Exception as error:  # whatever a tile does wrong is a finding
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    return ""


def _timed(name: str, shape: Shape, candidate: Candidate, expected: Tensor | None) -> tuple[dict[str, Any], Tensor]:
    from triton.testing import do_bench

    with _replaced(candidate), _Watch() as watch:
        call = TARGETS[name].prepare(shape)
        found = call()
        row: dict[str, Any] = {"target": name, "with": _said(candidate), "kernels": watch.seen}
        if expected is not None:
            error = (found.float() - expected.float()).norm() / expected.float().norm()
            if not error < 0.02:
                return row | {"wrong": error.item()}, found
        row["ms"] = do_bench(call, warmup=2, rep=8, return_mode="median")
    return row, found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, DEFAULT, dtype=DTYPES)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=90, help="most that compiling may take; what is late is left")
    parser.add_argument(
        "--jobs", type=positive, default=max(1, (os.cpu_count() or 2) - 1), help="processes that compile"
    )
    parser.add_argument("--best", type=count, default=4, help="lines to print for each operation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row, with commit and versions, here")


def run(options: argparse.Namespace) -> int:
    shape = Shape(**{name: getattr(options, name) for name in asdict(DEFAULT)})
    names = options.only or list(TARGETS)
    work = [(name, candidate) for name in names for candidate in TARGETS[name].candidates()]
    refused = _compile_all(work, shape, options.jobs, options.seconds)
    rows, wrong = [], 0
    for name in names:
        now, expected = _timed(name, shape, {}, None)
        found = []
        for candidate in tqdm([c for n, c in work if n == name], desc=name, disable=None):
            if (why := refused.get((name, _said(candidate)))) is not None:
                found.append({"target": name, "with": _said(candidate), "refused": why})
            else:
                try:
                    found.append(_timed(name, shape, candidate, expected)[0])
                except Exception as error:  # a launch that fails only here
                    found.append({"target": name, "with": _said(candidate), "refused": str(error)[:90]})
        rows += [now, *found]
        wrong += sum("wrong" in row for row in found)
        _show(name, now, found, options.best)
    if options.json:
        record.write(options.json, {"op": "tune", "shape": asdict(shape), "rows": rows})
    return 1 if wrong else 0


def _compile_all(
    work: list[tuple[str, Candidate]], shape: Shape, jobs: int, seconds: float
) -> dict[tuple[str, str], str]:
    """What cannot run, or was not compiled in time, and why."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    futures = {pool.submit(_compiled, name, shape, candidate): (name, _said(candidate)) for name, candidate in work}
    done, late = wait(futures, timeout=seconds)
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes if late else ():
        process.kill()
    found = {futures[future]: "not compiled in time" for future in late}
    for future in done:
        why = str(future.exception()) if future.exception() else future.result()
        if why:
            found[futures[future]] = why
    return found


def _show(name: str, now: dict[str, Any], found: list[dict[str, Any]], best: int) -> None:
    timed = sorted((row for row in found if "ms" in row), key=lambda row: row["ms"])
    print(f"\n{name}: {now['ms']:.4f} ms now {now['kernels']}; {len(timed)} of {len(found)} candidates timed")
    for row in timed[:best]:
        print(f"  {row['ms']:.4f} ms, {row['ms'] / now['ms']:.2f}: {row['with']} {row['kernels']}")
    for row in found:
        if "wrong" in row:
            print(f"  WRONG by {row['wrong']:.2g}: {row['with']}")
