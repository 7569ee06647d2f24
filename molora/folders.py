"""What folders of models are called in tables and on pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from molora.errors import UserError


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """Short name -> folder: what tells their paths apart, without a ``final`` at the end.

    Raises :class:`UserError` for a folder that is given twice.
    """
    paths = [Path(folder) for folder in folders]  # without a slash at the end
    for folder in folders:
        if paths.count(Path(folder)) > 1:
            raise UserError(f"{folder}: given twice")
    parts = [[part for part in Path(folder).parts if part not in ("/", ".")] for folder in folders]
    parts = [part[:-1] if part[-1:] == ["final"] and len(part) > 1 else part for part in parts]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    return dict(zip(folders, folders, strict=True))
