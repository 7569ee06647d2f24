"""Cost as work grows: the block at several tokens, experts, ranks or experts chosen, or a step at several depths.

Each point is a run of ``mlp`` (``step`` for layers), checked like it; beside the dispatch rule's choice of form both
forms are timed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from bench import mlp, record
from bench.arguments import add_run, add_shape, positive
from bench.problem import DTYPES, Shape

VALUES = {
    "tokens": (64, 256, 1024, 4096, 16384),
    "experts": (2, 4, 8, 16, 32),
    "rank": (8, 16, 32, 64, 128),
    "top_k": (1, 2, 4, 8),
    "layers": (2, 4, 8, 16),
}
"""What is swept if nothing else is asked for. ``top_k`` is swept over 8 experts."""

ONLY = ("molora", "molora dense", "molora grouped", "dense eager", "naive loop", "loop with index_select")
PEERS = ("eulerforge", "PEFT LoRA r=128")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--over", choices=list(VALUES), required=True)
    parser.add_argument("--values", type=positive, nargs="+", help="default: a list for each in bench/sweep.py")
    add_shape(parser, Shape(), filled=False, dtype=DTYPES)
    add_run(parser)
    parser.add_argument("--only", nargs="+", choices=list(mlp.ENTRIES), help="beside the frozen base")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    runs = []
    for value in options.values or VALUES[options.over]:
        runs.append(_measured(options, value))
        if options.json:  # after each value: a sweep that is stopped keeps what it has
            record.write(options.json, {"op": "sweep", "over": options.over, "threads": options.threads, "runs": runs})
    return 1 if any(result["wrong"] for result in runs) else 0


def _measured(options: argparse.Namespace, value: int) -> dict[str, Any]:
    given: dict[str, Any] = {"experts": 8} if options.over == "top_k" else {}
    given |= {name: asked for name in asdict(Shape()) if (asked := getattr(options, name)) is not None}
    given[options.over] = value
    only = options.only or (*ONLY, *PEERS)
    if options.over == "layers":
        from bench import step  # molora's configuration needs pydantic, which the rest does not

        known = {name: given[name] for name in asdict(step.Shape()) if name in given}
        names = [name for name in only if name in step.STEPS]
        result = step.measured(step.Shape(**known), names, options.rounds, options.warmup)
    else:
        result = mlp.measured(Shape(**given), only, options.rounds, options.warmup)
    record.show(f"{options.over} = {value}, {result['shape']['dtype']}, {result['shape']['device']}", result)
    return result
