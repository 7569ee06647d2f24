"""What a benchmark prints, and the JSON it leaves behind: no number without where it comes from."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from bench.provenance import provenance


def show(title: str, rows: list[dict[str, Any]], absent: dict[str, str]) -> None:
    """A table of variants, and a line for each that has no time, with the reason.

    Plain text, so that a benchmark runs on a machine that has nothing but torch and triton.
    """
    print(f"\n{title}")
    width = max(len(row["variant"]) for row in rows)
    print(f"{'':{width}}  forward ms  backward ms  total ms  over the frozen base (quartiles)  saved MiB")
    for row in rows:
        low, high = row["ratio_quartiles"]
        ratio = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        print(
            f"{row['variant']:{width}}  {row['fwd_ms']:10.2f}  {row['bwd_ms']:11.2f}  {row['total_ms']:8.2f}"
            f"  {ratio:>32}  {row['saved_mib']:9.1f}"
        )
    for name, reason in absent.items():
        print(f"{name}: not measured, {reason}")


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
