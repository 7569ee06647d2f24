"""Cost as work grows: the block at several tokens, experts, ranks or experts chosen, or a step at several depths.

Each point is a run of ``mlp`` (``step`` for layers), checked like it; beside the dispatch rule's choice of form both
forms are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from bench import mlp, record
from bench.arguments import Mistake, add_run, add_shape, positive
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
    points = _steps(options) if options.over == "layers" else _blocks(options)
    for value, measured in points:
        result = measured()
        record.show(f"{options.over} = {value}, {result['shape']['dtype']}, {result['shape']['device']}", result)
        runs.append(result)
        if options.json:  # after each value: a sweep that is stopped keeps what it has
            record.write(options.json, {"op": "sweep", "over": options.over, "threads": options.threads, "runs": runs})
    return 1 if any(result["wrong"] for result in runs) else 0


Points = list[tuple[int, Callable[[], dict[str, Any]]]]
"""Each value with what measures it; all shapes are made first, so that one that cannot be costs no other's time."""


def _given(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: asked for name in asdict(Shape()) if (asked := getattr(options, name)) is not None}
    if options.over in given:
        raise Mistake(f"--{options.over.replace('_', '-')}: is what is swept; say --values")
    return given


def _blocks(options: argparse.Namespace) -> Points:
    given = ({"experts": 8} if options.over == "top_k" else {}) | _given(options)
    only = options.only or (*ONLY, *PEERS)
    shapes = [Shape(**given, **{options.over: value}) for value in options.values or VALUES[options.over]]
    return [
        (getattr(shape, options.over), partial(mlp.measured, shape, only, options.rounds, options.warmup))
        for shape in shapes
    ]


def _steps(options: argparse.Namespace) -> Points:
    from bench import step  # molora's configuration needs pydantic, which the rest does not

    given = _given(options)
    if foreign := [f"--{name}" for name in given if name not in asdict(step.Shape())]:
        raise Mistake(f"{', '.join(foreign)}: a training step has none; leave it out of --over layers")
    if foreign := [name for name in options.only or () if name not in step.STEPS]:
        raise Mistake(f"--only {', '.join(foreign)}: is no training step; --over layers has {', '.join(step.STEPS)}")
    only = options.only or [name for name in (*ONLY, *PEERS) if name in step.STEPS]
    return [
        (value, partial(step.measured, step.Shape(**given, layers=value), only, options.rounds, options.warmup))
        for value in options.values or VALUES["layers"]
    ]
