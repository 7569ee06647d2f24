"""Where a run came from: code, versions, command, hardware, seed and data, written beside its weights."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from molora.config import Config
from molora.files import file_sha256

_PACKAGES = ("molora", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def collect(config: Config, processes: int = 1) -> dict[str, Any]:
    """Plain data that says what ran on which data files (SHA-256 by path); what cannot be found out is None."""
    paths = [config.data.path] if isinstance(config.data.path, str) else config.data.path or []
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "seed": config.seed,
        "data": {path: file_sha256(Path(path)) for path in paths},
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    # An installed copy lies in no checkout, or in somebody else's that has nothing to say about this code.
    if not (here.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
