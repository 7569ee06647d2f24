"""What a benchmark prints, and the JSON it leaves behind: no number without where it comes from."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.arguments import Mistake
from bench.provenance import provenance

COLUMNS = {
    "update_ms": "update ms",
    "host_ms": "host ms",
    "kernels_ms": "kernels ms",
    "peak_mib": "peak MiB",
    "gbyte": "GB fwd, bwd",
    "gflop": "GFLOP",
    "floor_ms": "roofline ms",
    "share": "reached",
}
"""What some rows have, and its heading."""


def show(title: str, result: dict[str, Any]) -> None:
    """A table of variants, and a line for each that has no time, with the reason.

    Plain text, so that a benchmark runs on a machine that has nothing but torch and triton.
    """
    print(f"\n{title}")
    rows = result["rows"]
    width = max((len(row["variant"]) for row in rows), default=0)
    over = f"over {result['base']} (quartiles)"
    extra = {key: head for key, head in COLUMNS.items() if any(key in row for row in rows)}
    heads = "".join(f"  {head:>15}" for head in extra.values())
    print(f"{'':{width}}  forward ms  backward ms   total ms  {over:>33}  saved MiB{heads}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        ratio = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        cells = "".join(f"  {_cell(row.get(key)):>15}" for key in extra)
        print(
            f"{row['variant']:{width}}  {row['fwd_ms']:10.2f}  {row['bwd_ms']:11.2f}  {row['total_ms']:9.2f}"
            f"  {ratio:>{max(33, len(over))}}  {row['saved_mib']:9.1f}{cells}"
        )
    for name, reason in result["not_measured"].items():
        print(f"{name}: not measured, {reason}")
    for name, reason in result["wrong"].items():
        print(f"{name}: wrong, not timed: {reason}")


def _cell(value: float | list[float] | None) -> str:
    numbers = [] if value is None else value if isinstance(value, list) else [value]
    return ", ".join(f"{number:.2f}" for number in numbers)


def write(path: str | Path, what: dict[str, Any]) -> None:
    """Write a result with its provenance as JSON, whole or not at all."""
    whole = {**what, "provenance": provenance() | _hardware()}
    write_text(Path(path), json.dumps(whole, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; :class:`Mistake` where it cannot be, as on a full disk."""
    aside = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise Mistake(f"{path}: cannot be written ({error.strerror}); make room, or name another file") from error


def _hardware() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu(), "cpu_count": os.cpu_count(), "gpu": gpu}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line for line in lines if line.startswith("flags")), "")
    return name + "".join(f", {flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags)
