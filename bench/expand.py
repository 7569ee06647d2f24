"""Adding the experts to a frozen projection: a product beside it, or more columns of it (K-concatenation).

Products alone, no routing: y = x W^T + h B^T, and in backward dh = dy B and dx = dy W + dh A. As more columns, [x | h]
and [W | B] lie in one buffer each, as whoever computes x and h would have to write them; one product gives y, another
[dx | dh]. Each way is held to fp64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import check, measure, record
from bench.arguments import add_run, positive
from bench.measure import Variant
from bench.problem import DTYPES

BASE, EAGER = "frozen alone", "beside it, after"
SHAPES = {"cpu": ((1024, 2816), (2816, 1024)), "cuda": ((3072, 8192), (8192, 3072), (3072, 1024))}
"""(K, N): the block of the CPU goals; Llama-3.2-3B's gate and up, down, k and v."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--columns", type=positive, default=128, help="of h: experts x rank")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    add_run(parser)


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    cases = [_measured(k, n, options) for k, n in SHAPES[options.device]]
    if options.json:
        shape = {name: getattr(options, name) for name in ("tokens", "columns", "dtype", "device")}
        result = {"op": "expand", "threads": options.threads, "shape": shape, "rounds": options.rounds, "cases": cases}
        record.write(options.json, result)
    return 1 if any(case["wrong"] for case in cases) else 0


def _measured(k: int, n: int, options: argparse.Namespace) -> dict[str, Any]:
    dtype = DTYPES[options.dtype]
    tensors = _tensors(options.tokens, k, n, options.columns, dtype, options.device)
    ways, exact = _ways(tensors), _results(_ways({name: t.double() for name, t in tensors.items()})[EAGER])
    allowed = check.errors(_results(ways[EAGER]), exact)
    wrong = {}
    for name, way in ways.items():
        if name != BASE and (fault := check.fault(_results(way), exact, allowed, dtype)):
            wrong[name] = fault
    variants = {
        name: Variant(lambda _, forward=forward: forward(), [], backward=lambda *_, backward=backward: backward())
        for name, (forward, backward) in ways.items()
        if name not in wrong
    }
    rows = measure.rows(
        variants, tensors["x"], tensors["dy"], [], base=BASE, rounds=options.rounds, warmup=options.warmup
    )
    print(f"\n{options.tokens} x {k} -> {n}, {options.columns} columns, {options.dtype}, {options.device}")
    print(f"{'':24}{'forward ms':>12}{'backward ms':>13}{'over frozen (quartiles)':>28}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        over = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        print(f"{row['variant']:24}{row['fwd_ms']:12.3f}{row['bwd_ms']:13.3f}{over:>28}")
    for name, fault in wrong.items():
        print(f"{name}: not measured, wrong: {fault}")
    return {"k": k, "n": n, "rows": rows, "wrong": wrong}


def _tensors(tokens: int, k: int, n: int, r: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """What there is, both by itself and in one buffer."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * std).to(dtype)

    x, h, w, b = normal(tokens, k), normal(tokens, r), normal(n, k, std=k**-0.5), normal(n, r, std=k**-0.5)
    a, dy = normal(r, k, std=n**-0.5), normal(tokens, n)
    together = {"xh": torch.cat([x, h], 1), "wb": torch.cat([w, b], 1), "wa": torch.cat([w, a])}
    return {"x": x, "h": h, "w": w, "b": b, "a": a, "dy": dy, "dydh": torch.cat([dy, h], 1), **together}


Way = tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, Tensor]]]
"""Forward, which gives y, and backward, which gives dx and dh."""


def _ways(of: dict[str, Tensor]) -> dict[str, Way]:
    x, h, w, b, a, dy, xh, wb, wa, dydh = (
        of[name] for name in ("x", "h", "w", "b", "a", "dy", "xh", "wb", "wa", "dydh")
    )
    (n, k), dydh = w.shape, dydh.clone()

    def beside() -> tuple[Tensor, Tensor]:
        dh = dy @ b
        return torch.mm(dh, a).addmm_(dy, w), dh

    def columns() -> tuple[Tensor, Tensor]:
        dx, dh = torch.split(dy @ wb, [k, b.shape[1]], dim=1)
        return dx.addmm_(dh, a), dh

    def rows() -> tuple[Tensor, Tensor]:
        dh = dydh[:, n:]
        torch.mm(dy, b, out=dh)
        return dydh @ wa, dh

    return {
        BASE: (lambda: x @ w.T, lambda: (dy @ w, h)),
        EAGER: (lambda: (x @ w.T).addmm_(h, b.T), lambda: ((dy @ w).addmm_(dh := dy @ b, a), dh)),
        "beside it, first": (lambda: (h @ b.T).addmm_(x, w.T), beside),
        "more columns": (lambda: xh @ wb.T, columns),
        "columns; rows backward": (lambda: xh @ wb.T, rows),
    }


def _results(way: Way) -> check.Results:
    forward, backward = way
    (dx, dh), y = backward(), forward()
    return {name: [t.cpu().double()] for name, t in (("y", y), ("dx", dx), ("dh", dh))}
