"""What a benchmark prints, and the JSON it leaves behind: no number without where it comes from."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.provenance import provenance


def show(title: str, rows: list[dict[str, Any]], absent: dict[str, str]) -> None:
    """A table of variants, and a line for each that has no time, with the reason."""
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    for column in ("forward ms", "backward ms", "total ms", "over the frozen base", "quartiles", "saved MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["ratio_quartiles"]
        table.add_row(
            row["variant"], f"{row['fwd_ms']:.1f}", f"{row['bwd_ms']:.1f}", f"{row['total_ms']:.1f}",
            f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['saved_mib']:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for name, reason in absent.items():
        console.print(f"{name}: not measured, {reason}")


def write(path: str | Path, what: dict[str, Any], rows: list[dict[str, Any]], absent: dict[str, str]) -> None:
    """Write rows with provenance as JSON, through a temporary file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = what | {"provenance": provenance() | _hardware(), "rows": rows, "not_measured": absent}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


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
