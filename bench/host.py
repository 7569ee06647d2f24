"""What a decoder layer costs the host of a GPU, without a GPU: launches, and the time to make them.

A GPU that is fast enough waits for the host. Here kernels are compiled for sm_90 and everything is done for a launch
but the launch; PyTorch's own operators compute on the CPU, on tensors so small that what they take is their call. So
times are not those of a GPU's host, which also hands each launch to the driver: look at ratios, and at the launches.
All is for one layer, forward and backward: the difference between a model of five and one of a single layer. Only the
dense form runs so: the grouped one reads what its kernels found.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import molora_kernels as mk
from bench import peers, record, step
from bench.arguments import count, positive
from bench.registry import KERNEL_MODULES
from molora.trainer import checkpoint_activations

FEW, MANY = 1, 5
LAUNCHES_NOTHING = {
    "view", "reshape", "empty", "empty_strided", "new_empty", "empty_like", "slice", "split", "split_with_sizes",
    "chunk", "narrow", "select", "unbind", "as_strided", "t", "transpose", "expand", "unsqueeze", "squeeze", "detach",
    "permute", "_unsafe_view", "alias", "resize_", "view_as", "expand_as", "numpy_T", "_reshape_alias", "lift_fresh",
    "result_type", "promote_types", "resolve_conj", "resolve_neg", "contiguous", "flatten", "unflatten", "to", "real",
}  # fmt: skip
"""PyTorch's operators that only describe memory, or take it, or leave the rest to others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpointing", default="none", choices=["none", "non_reentrant", "reentrant"])
    parser.add_argument("--rounds", type=positive, default=60)
    parser.add_argument("--warmup", type=count, default=10)
    parser.add_argument("--json", metavar="FILE", help="write the rows with provenance here")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # to make a small bf16 product ready, oneDNN takes longer than cuBLAS in all
    shape = step.Shape(model="micro", rows=1, length=4, dtype="bf16", checkpointing=options.checkpointing)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    step.MODELS["micro"] = {**small, "num_hidden_layers": FEW, "vocab_size": 256}
    rows, absent = measured(shape, _launch_nothing(), options.rounds, options.warmup)
    print(f"{'':16} kernels  operators  host ms  over frozen base")
    for row in rows:
        print(
            f"{row['variant']:16} {row['kernels']:7} {row['operators']:10} {row['host_ms']:8.3f} {row['ratio']:17.2f}"
        )
    for name, why in absent.items():
        print(f"{name}: not measured, {why}")
    if options.json:
        what = {"op": "host", "shape": asdict(shape), "threads": 1, "rows": rows, "not_measured": absent}
        record.write(options.json, what)
    return 0


def measured(
    shape: step.Shape, launched: list[str], rounds: int, warmup: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each variant, and why others have none."""
    steps: dict[str, list[Callable[[], None]]] = {}
    absent: dict[str, str] = {}
    for name in (step.BASE, "molora", "PEFT LoRA r=64"):
        try:
            steps[name] = [_step(name, replace(shape, layers=layers)) for layers in (FEW, MANY)]
        except peers.Absent as why:
            absent[name] = str(why)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name, (few, many) in steps.items():
            seconds = _seconds(many) - _seconds(few)
            if i >= warmup:
                times[name].append(seconds)
    rows = []
    base = statistics.median(times[step.BASE])
    for name, both in steps.items():
        few, many = (_launches(one, launched) for one in both)
        kernels, operators = ((b - a) / (MANY - FEW) for a, b in zip(few, many, strict=True))
        host = statistics.median(times[name])
        rows.append({
            "variant": name, "kernels": round(kernels), "operators": round(operators),
            "host_ms": round(1e3 * host / (MANY - FEW), 4), "ratio": round(host / base, 3),
        })  # fmt: skip
    return rows, absent


def _step(name: str, shape: step.Shape) -> Callable[[], None]:
    """One forward and backward."""
    made, batch = step.STEPS[name](step.base_model(shape), shape), step.batch_of(shape)
    made.model.enable_input_require_grads()
    checkpoint_activations(made.model, shape.checkpointing)

    def once() -> None:
        for leaf in made.leaves:
            leaf.grad = None
        made.backward(made.forward(batch))

    return once


def _seconds(once: Callable[[], None]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def _launches(once: Callable[[], None], launched: list[str]) -> tuple[int, int]:
    """Kernels of Triton, and operators of PyTorch that launch something: one each, as most do on a GPU, with all that
    they call on a CPU."""
    launched.clear()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        once()
    return len(launched), sum(_launches_one(e) and not _within_one(e) for e in seen.events() or [])


def _launches_one(event: Any) -> bool:
    return event.name.startswith("aten::") and event.name.removeprefix("aten::") not in LAUNCHES_NOTHING


def _within_one(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (_launches_one(parent) or _within_one(parent))


def _launch_nothing() -> list[str]:
    """From here on in this process Triton compiles for an H100 that is not there, for tensors on the CPU. Gives the
    names of kernels as they would be launched."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET is 1, and kernels that are interpreted are not launched: unset it")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    for module in KERNEL_MODULES:
        importlib.import_module(module)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    class Device:
        """What a launch asks of a driver."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

    launched: list[str] = []

    def init_handles(self: Any) -> None:
        if self.module is None:
            self.module, self.function = 1, 0
            self._run = lambda *_: launched.append(self.name)

    driver.set_active(Device())  # pyright: ignore[reportArgumentType] # all that is asked
    CompiledKernel._init_handles = init_handles
    os.environ["TRITON_INTERPRET"] = "1"  # or the backend refuses tensors on a CPU
    mk.use_backend("triton")
    return launched
