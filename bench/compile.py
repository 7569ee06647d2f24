"""Compile every kernel with every tile it can run with, for GPUs that need not be there.

Fails on a register spill, on more shared memory than the GPU has, and on a matrix product that found no tensor core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.arguments import Mistake, positive
from bench.provenance import commit_of, provenance
from bench.record import write_text
from bench.registry import KERNEL_MODULES

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
"""CUDA compute capabilities. AMD's gfx942 compiles too, when asked for."""
QUICK = ("80", "90", "120")


@dataclass(frozen=True)
class Task:
    """A case, named so that another process finds it again: triton's kernels do not travel between processes."""

    arch: str
    module: str
    index: int
    kernel: str
    label: str


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a case."""

    arch: str
    kernel: str
    label: str
    tiles: str
    registers: int
    spilled: int
    """Bytes of stack and local memory a thread."""
    shared: int
    shared_limit: int
    instruction: str
    """The tensor-core instruction found, or empty."""
    fault: str
    """Why the case fails, or empty."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", type=_architecture, help="such as 80 90 gfx942 (default: 80 to 120)")
    parser.add_argument("--kernel", nargs="+", help="only kernels whose name contains one of these")
    parser.add_argument(
        "--quick", action="store_true", help="one case per kernel and dtype (default: for 80, 90 and 120)"
    )
    parser.add_argument(
        "--jobs", type=positive, default=min(2, os.cpu_count() or 1), help="processes (default: up to 2)"
    )
    parser.add_argument("--json", type=Path, help="write every row, with commit and versions, to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="compile nothing: join what earlier runs wrote; of a kernel and GPU in several, the last counts",
    )


def _architecture(text: str) -> str:
    """Of those from 75 on, which Triton needs, the ones that the assembler of CUDA 13.4 knows."""
    if not re.fullmatch(r"75|8[06-9]|90|10[0137]|110|12[01]|gfx\d[0-9a-f]{2,3}", text):
        raise argparse.ArgumentTypeError(
            f"{text}: must be the compute capability of a CUDA GPU, such as 90, or such as gfx942"
        )
    return text


def run(arguments: argparse.Namespace) -> int:
    if arguments.merge:
        runs = [_read_json(path) for path in arguments.merge]
        sources = [source for found, _ in runs for source in found]
        last: dict[tuple[str, str], list[Compiled]] = {}
        for _, found in runs:
            rows = sorted(found, key=_of_kernel)
            last |= {key: list(group) for key, group in groupby(rows, _of_kernel)}
        rows = [row for group in last.values() for row in group]
    else:
        # The interpreter's kernels cannot be compiled, and workers inherit this environment.
        os.environ["TRITON_INTERPRET"] = "0"
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        architectures = arguments.arch or (QUICK if arguments.quick else ARCHITECTURES)
        tasks = _tasks(architectures, arguments.quick)
        tasks = [task for task in tasks if any(name in task.kernel for name in arguments.kernel or [""])]
        if not tasks:
            raise SystemExit(f"no kernel's name contains {' or '.join(arguments.kernel)}")
        sources, rows = [provenance()], list(_compile_all(tasks, arguments.jobs))
    rows.sort(key=lambda row: (row.kernel, len(row.arch), row.arch, row.label))

    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    console.print(_table(rows))
    faults = [row for row in rows if row.fault]
    for row in faults:
        console.print(f"[red]{_name(row.arch)} {row.kernel} {row.label} {row.tiles}: {row.fault}", highlight=False)
    console.print(f"{len(rows)} compiled, {len(faults)} at fault")
    if arguments.json:
        _write_json(arguments.json, sources, rows)
    if arguments.markdown:
        _write_markdown(arguments.markdown, sources, rows)
    return 1 if faults else 0


def _of_kernel(row: Compiled) -> tuple[str, str]:
    return row.arch, row.kernel


def _read_json(path: Path) -> tuple[list[dict[str, Any]], list[Compiled]]:
    """What :func:`_write_json` was given."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"--merge {path}: cannot be read ({error})") from error
    if not isinstance(found, dict) or found.get("columns") != [field.name for field in fields(Compiled)]:
        raise Mistake(f"--merge {path}: was not written by this version's compile --json")
    return found["runs"], [Compiled(*row) for row in found["rows"]]


def _write_json(path: Path, sources: list[dict[str, Any]], rows: list[Compiled]) -> None:
    """One row a line: names of the columns first, then their values."""
    lines = ",\n".join(json.dumps(list(asdict(row).values())) for row in rows)
    columns = json.dumps([field.name for field in fields(Compiled)])
    text = f'{{"runs": {json.dumps(sources, indent=1)},\n"columns": {columns},\n"rows": [\n{lines}\n]}}\n'
    write_text(path, text)


def _write_markdown(path: Path, sources: list[dict[str, Any]], rows: list[Compiled]) -> None:
    heads, *lines = _worst(rows)
    versions = sorted({f"Triton {source['packages']['triton']}, {commit_of(source)}" for source in sources})
    text = [
        "# Compile matrix",
        "",
        f"{len(rows)} cases, {sum(bool(row.fault) for row in rows)} at fault: every kernel with every tile that its",
        "launcher can pick, compiled without a GPU. At fault is a case that spills, wants more shared memory than",
        "there is, or has a matrix product and no tensor-core instruction. Below, the worst of each kernel and GPU.",
        "",
        f"From {'; '.join(versions)}. Written by `python -m bench compile --markdown`; do not edit.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * 2 + "|--:" * (len(heads) - 2) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]
    write_text(path, "\n".join(text) + "\n")


def _tasks(architectures: Iterable[str], quick: bool) -> Iterator[Task]:
    for arch in architectures:
        for module in KERNEL_MODULES:
            seen = set()
            for index, case in enumerate(_cases(module, arch)):
                if quick and _kind(case) in seen:
                    continue
                seen.add(_kind(case))
                yield Task(arch, module, index, case.kernel.__name__, case.label)


def _cases(module: str, arch: str) -> list[Any]:
    """And of each kind, which is a kernel and the dtypes of its tensors, one for a single token: an argument of 1 is a
    constant, with which not all compiles that does without."""
    from molora_kernels._triton.cases import distinct

    cases = list(importlib.import_module(module).compile_cases(_capability(arch)))
    kinds = {_kind(case): case for case in reversed(cases) if "T" in case.scalars}
    ones = [replace(c, label=f"{c.label} T=1", scalars={**c.scalars, "T": 1}) for c in reversed(kinds.values())]
    return distinct([*cases, *ones])


def _kind(case: Any) -> tuple[str, str]:
    return case.kernel.__name__, str(sorted(case.pointers.items(), key=str))


def _capability(arch: str) -> tuple[int, int] | None:
    return (int(arch[:-1]), int(arch[-1])) if arch.isdigit() else None


def _name(arch: str) -> str:
    return f"sm_{arch}" if arch.isdigit() else arch


def _compile_all(tasks: list[Task], jobs: int) -> Iterator[Compiled]:
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_task, task) for task in tasks]
        for future in track(as_completed(futures), total=len(futures), description="compiling"):
            yield future.result()


def compile_task(task: Task) -> Compiled:
    """Compile one case as a launch would, and read what the assembler says about it."""
    from molora_kernels._triton.tiles import shared_memory_kib

    case = _cases(task.module, task.arch)[task.index]
    limit = shared_memory_kib(_capability(task.arch)) * 1024
    tiles = ", ".join(f"{name}={value}" for name, value in asdict(case.tiles).items() if value)
    compiled = compile_case(case, task.arch)
    registers, spilled = _resources(compiled.asm)
    shared = compiled.metadata.shared
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    found = re.search(r"tcgen05\.mma|wgmma\.mma_async|mma\.sync|v_mfma", assembly)
    faults = []
    if spilled:
        faults.append(f"{spilled} bytes a thread spilled")
    if shared > limit:
        faults.append(f"{shared} bytes of shared memory, {limit} there")
    if case.tensor_cores and not found:
        faults.append("no tensor-core instruction")
    return Compiled(
        task.arch, task.kernel, task.label, tiles, registers, spilled, shared, limit,
        found[0] if found else "", "; ".join(faults),
    )  # fmt: skip


def compile_case(case: Any, arch: str) -> Any:
    """What triton makes of a case: ``.asm`` has every stage from "ttir" to the object file."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(case)
    return triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", int(arch), 32) if arch.isdigit() else GPUTarget("hip", arch, 64),
        options={"num_warps": case.tiles.num_warps, "num_stages": case.tiles.num_stages},
    )


def specialise(case: Any) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], list[Any]]]:
    """Signature, constants and attributes as triton's launcher derives them from the arguments of a call; the last two
    by position, and by position within an argument that is a tuple."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for position, name in enumerate(case.kernel.arg_names):
        given = {**case.scalars, **case.pointers}.get(name)
        if given is None:
            signature[name], constants[(position,)] = "constexpr", case.constants[name]
        elif isinstance(given, tuple):
            parts = enumerate(given)
            signature[name] = tuple(_type_of(one, (position, i), constants, attributes) for i, one in parts)
        else:
            signature[name] = _type_of(given, (position,), constants, attributes)
    return signature, constants, attributes


def _type_of(
    given: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any], attributes: dict[tuple[int, ...], Any]
) -> str:
    """Of one pointer or number; where it is a constant, or known to be divisible, is written to the other two."""
    import torch

    types = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.bool: "u1"}
    types |= {torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
    if isinstance(given, float):
        return "fp32"
    if isinstance(given, int) and given == 1:
        constants[path] = 1
        return "constexpr"
    if isinstance(given, torch.dtype) or given % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(given, torch.dtype):
        return "*" + types[given]
    return "i32" if abs(given) < 1 << 31 else "i64"


def _resources(asm: Mapping[str, Any]) -> tuple[int, int]:
    """(registers, bytes spilled) of a thread, from the object file; AMD's compiler states them in its assembly."""
    if "amdgcn" in asm:
        stated = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", asm["amdgcn"]))
        return int(stated["vgpr_count"]), 4 * int(stated["vgpr_spill_count"])

    import triton.backends.nvidia

    tool = Path(next(iter(triton.backends.nvidia.__path__))) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _table(rows: list[Compiled]) -> Table:
    heads, *lines = _worst(rows)
    table = Table(title="the worst of each kernel's cases")
    for column in heads:
        table.add_column(column, justify="left" if column in ("kernel", "instruction") else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _worst(rows: list[Compiled]) -> Iterator[tuple[str, ...]]:
    """Headings, then for each kernel and architecture the most of everything."""
    yield "kernel", "arch", "cases", "regs", "spilled", "shared", "instruction", "faults"
    for kernel, arch in dict.fromkeys((row.kernel, row.arch) for row in rows):
        group = [row for row in rows if (row.kernel, row.arch) == (kernel, arch)]
        yield (
            kernel,
            _name(arch),
            str(len(group)),
            str(max(row.registers for row in group)),
            str(max(row.spilled for row in group)),
            f"{max(row.shared for row in group) / 1024:.0f}/{group[0].shared_limit / 1024:.0f} KiB",
            " ".join(sorted({row.instruction.split(".")[0] for row in group} - {""})),
            str(sum(bool(row.fault) for row in group)),
        )
