"""Files that are either whole or absent, and what their bytes hash to."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from molora.errors import UserError


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` to build a file or a folder at; moved over ``target`` if the block succeeds.

    If it fails, ``target`` stays as it was and the temporary is removed. A full disk, a folder without permission and
    a file in place of a folder become a :class:`UserError`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            yield new
            if new.is_file():
                check_target(target)
            if target.is_dir():
                target.rename(old)  # a rename cannot replace a folder that holds something
            try:
                new.replace(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    except SafetensorError as error:  # which wraps a full disk
        raise UserError(f"{target}: cannot be written ({error})") from error


def check_target(path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise :class:`UserError` for a folder, or one of the ``inputs``, where a file is to be written.

    To be called before long work too, so that its result has a place.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, and a file is to be written; name a file, for example in it")
    if path.resolve() in {Path(one).resolve() for one in inputs}:
        raise UserError(f"{path}: is read here, and writing would replace it; choose another name")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", newline="\n")
