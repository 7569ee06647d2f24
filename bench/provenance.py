"""Where a number came from: no result is written without it. Not :mod:`molora.provenance`, because kernels are measured
on machines that have nothing but torch and Triton."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "peft", "eulerforge", "mixlora", "moe-peft", "unsloth")

WRITTEN = ("--json", "--markdown", "--folder")
"""Flags whose values are what a command writes to."""


def provenance() -> dict[str, Any]:
    """Command, commit and versions; ``uncommitted_changes`` concerns tracked files that are no results.

    A copy of the code is told its commit by the environment variable ``MOLORA_COMMIT``, whatever else it holds: whoever
    copied it knows what the copy's own history need not say, and whether all of it was committed.
    """
    told = os.environ.get("MOLORA_COMMIT")
    status = ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
    changed = None if told else _git(*status)
    return {
        "command": " ".join(["python", *_argv()]),
        "commit": told or _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _argv() -> list[str]:
    """As it was called, but where the result was put for the moment is nobody's business: its name says which it is."""
    words = sys.orig_argv[1:]
    for i, word in enumerate(words):
        flag, equals, path = word.partition("=")
        if i and words[i - 1] in WRITTEN:
            words[i] = Path(word).name
        elif equals and flag in WRITTEN:
            words[i] = f"{flag}={Path(path).name}"
    return words


def commit_of(source: Mapping[str, Any]) -> str:
    """The commit of a :func:`provenance`, as tables name it."""
    return f"commit `{source['commit'][:7]}`" if source["commit"] else "commit unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
