"""Files that are either whole or absent, and the packages that they come from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molora.errors import UserError


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` to build a file or a folder at; moved over ``target`` if the block succeeds.

    If it fails, ``target`` stays as it was and the temporary is removed. A full disk or a folder without permission
    becomes a :class:`UserError`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            yield new
            if target.is_dir():
                target.rename(old)  # a rename cannot replace a folder that holds something
            new.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", newline="\n")


def package_folder(module: str, requirement: str, *pip_options: str) -> Path:
    """Where the installed package that provides ``module`` lies, without importing it.

    ``requirement`` is ``name==version``, exactly: what is prepared must be the same bytes everywhere. Raises
    :class:`UserError` with the command that installs it, if it is missing or has another version.
    """
    name, _, wanted = requirement.partition("==")
    command = " ".join(["pip install", *pip_options, requirement])
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {name} is not installed; install it with: {command}")
    found = importlib.metadata.version(name)
    if found != wanted:
        raise UserError(f"the package {name} has version {found}, {wanted} is needed; install it with: {command}")
    return Path(spec.submodule_search_locations[0])
