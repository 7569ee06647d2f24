"""Every result that the documentation shows, one command each; ``report`` then puts them there.

Each runs in a process of its own; one that fails does not stop the others, and the exit code says that one did.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator

from bench.arguments import Mistake
from bench.report import RESULTS
from bench.tables import AMX
from molora_kernels.cpu import has_amx

WITHOUT_COMPILING = (
    "transformers LlamaMLP", "molora", "molora dense", "molora grouped", "naive loop", "loop with index_select",
    "dense eager", "PEFT LoRA r=64", "PEFT LoRA r=128", "eulerforge", "mixlora", "moe-peft",
)  # fmt: skip
"""What is timed without ``torch.compile``: dropout gives it nothing new to show, and on a GPU, where compiling may take
longer than all the rest, it has a run of its own."""


def commands(device: str) -> Iterator[tuple[str, list[str]]]:
    """(name of the result, arguments of ``python -m bench``)"""
    return _on_cuda() if device == "cuda" else _on_a_cpu(AMX if has_amx() else "")


def _on_a_cpu(kind: str) -> Iterator[tuple[str, list[str]]]:
    """``kind`` ends the names of what the pages show of two CPUs."""
    yield f"mlp-cpu-fp32{kind}", ["mlp"]
    # Until oneDNN has met most numbers of rows that an expert gets, as after some steps of training.
    yield f"mlp-cpu-bf16{kind}", ["mlp", "--dtype", "bf16", "--warmup", "20"]
    yield f"mlp-cpu-fp32-dropout{kind}", ["mlp", "--dropout", "0.05", "--only", *WITHOUT_COMPILING]
    yield f"step-cpu-fp32{kind}", ["step"]
    yield "step-cpu-fp32-compile", ["step", "--compile", "--only", "molora"]
    yield "host-sm90", ["host"]
    yield "host-sm90-checkpointing", ["host", "--checkpointing", "non_reentrant"]
    yield "decode-cpu-bf16", ["decode", "--model", "data/quickstart/model", "--batch", "1", "2", "4", "8", "32"]
    for dtype in ("fp32", "bf16"):
        yield f"op-cpu-{dtype}", ["op", "--dtype", dtype, "--rounds", "7"]
        yield f"expand-cpu-{dtype}", ["expand", "--dtype", dtype]
    for dtype in ("fp32", "bf16"):
        yield f"sweep-cpu-{dtype}-tokens", ["sweep", "--over", "tokens", "--dtype", dtype, "--rounds", "5"]
    for over in ("experts", "rank", "top_k", "layers"):
        yield f"sweep-cpu-fp32-{over}", ["sweep", "--over", over, "--rounds", "5"]
    for over in ("experts", "rank"):
        yield f"sweep-cpu-bf16-{over}", ["sweep", "--over", over, "--dtype", "bf16", "--rounds", "5"]


def _on_cuda() -> Iterator[tuple[str, list[str]]]:
    block = ["--device", "cuda", "--dtype", "bf16", "--hidden", "3072", "--intermediate", "8192"]
    model = ["--device", "cuda", "--dtype", "bf16", "--model", "llama3.2-3b"]
    yield "mlp-cuda-bf16", ["mlp", *block, "--tokens", "8192", "--only", *WITHOUT_COMPILING]
    compiled = ["--only", "molora", "dense torch.compile"]
    yield "mlp-cuda-bf16-compile", ["mlp", *block, "--tokens", "8192", *compiled]
    yield (
        "mlp-cuda-bf16-dropout",
        ["mlp", *block, "--tokens", "8192", "--dropout", "0.05", "--only", *WITHOUT_COMPILING],
    )
    yield "op-cuda-bf16", ["op", *block, "--tokens", "8192"]
    yield "expand-cuda-bf16", ["expand", "--device", "cuda", "--dtype", "bf16", "--tokens", "8192"]
    for stage, rows, length in (("stage1", 10, 512), ("stage2", 8, 1024)):
        size = ["--rows", str(rows), "--length", str(length), "--rounds", "5", "--warmup", "2"]
        for kind in ("none", "non_reentrant"):
            suffix = "" if kind == "none" else "-checkpointing"
            yield f"step-cuda-bf16-{stage}{suffix}", ["step", *model, *size, "--checkpointing", kind]
        # Both micro-batches of an optimizer step as one: a GPU that waits for its host waits half as long.
        whole = ["--rows", str(2 * rows), *size[2:], "--checkpointing", "non_reentrant"]
        yield f"step-cuda-bf16-{stage}-whole", ["step", *model, *whole]
        compiled = ["--checkpointing", "non_reentrant", "--compile", "--only", "molora"]
        yield f"step-cuda-bf16-{stage}-compile", ["step", *model, *size, *compiled]
    yield "recipe-cuda", ["recipe", "--device", "cuda"]
    for over in ("tokens", "experts", "rank", "top_k"):
        fixed = [] if over == "tokens" else ["--tokens", "8192"]
        yield f"sweep-cuda-bf16-{over}", ["sweep", "--over", over, *block, *fixed, "--rounds", "10"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--match", default="", help="only results whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")


def run(options: argparse.Namespace) -> int:
    root, failed = RESULTS.parent.parent, []
    chosen = {name: arguments for name, arguments in commands(options.device) if options.match in name}
    if not chosen:
        raise Mistake(f"--match {options.match}: no result's name for {options.device} contains it; --list shows them")
    for name, arguments in chosen.items():
        whole = [*arguments, "--json", str(RESULTS.relative_to(root) / f"{name}.json")]
        print("python -m bench", shlex.join(whole), flush=True)
        if not options.list:
            done = subprocess.run([sys.executable, "-m", "bench", *whole], cwd=root, check=False)
            failed += [name] if done.returncode else []
    if failed:
        print("failed:", ", ".join(failed))
    return 1 if failed else 0
