"""Tokenised rows on disk, so that a run that starts again, or the next rank, does not tokenise them again.

A file in ``~/.cache/molora/tokens`` (``$XDG_CACHE_HOME/molora/tokens``) is named by what its tokens depend on: the
contents of the rows, the whole tokenizer, the chat format, the length, and the code that encodes. Whatever changes, the
name changes, so no entry is ever stale. Entries are written whole and checked when read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora import chat
from molora.errors import UserError
from molora.files import file_sha256, replacing

Tensors = dict[str, Tensor]
FORMAT = 1
"""Of an entry; counts up when the tensors change their meaning."""
KEEP = 32
"""Entries kept; the ones that were used longest ago go first."""

_log = logging.getLogger(__name__)


def folder() -> Path:
    """Where the entries are; the XDG variable moves it. Raises :class:`UserError` for a user without a home folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "molora" / "tokens"
    except RuntimeError:
        raise UserError("there is no home folder; set XDG_CACHE_HOME to a folder, or data.cache to false") from None


def through(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    max_length: int,
    make: Callable[[], Tensors],
) -> Tensors:
    """What ``make()`` returns for these rows: read from the cache if it is there and whole, else made and kept.

    A tokenizer that cannot be described in full is not cached. A cache that cannot be written costs a warning only.
    """
    name = key(tokenizer, rows, max_length)
    if name is None:
        return make()
    try:
        path = folder() / f"{name}.safetensors"
    except UserError as error:
        _log.warning("warning: the tokenised rows are not cached: %s", error)
        return make()
    try:
        tensors = _read(path)
        with suppress(OSError):  # of a cache that may only be read
            os.utime(path)  # used last, so forgotten last
        return tensors
    except FileNotFoundError:
        pass  # not there yet, or forgotten by another run a moment ago
    except (OSError, SafetensorError, ValueError) as error:
        _log.warning("warning: %s is damaged (%s); the rows are tokenised again", path, error)
    tensors = make()
    try:
        with replacing(path) as new:
            save_file(tensors, new, metadata={"sha256": _digest(tensors)})
        _forget_oldest()
    except (UserError, OSError, SafetensorError) as error:
        _log.warning("warning: the tokenised rows are not cached: %s", error)
    return tensors


def key(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], max_length: int) -> str | None:
    """SHA-256 of everything that the tokens depend on; None for a tokenizer that is not a fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.sha256()
    for part in (
        FORMAT,
        file_sha256(Path(chat.__file__)),
        transformers.__version__,
        tokenizers.__version__,
        max_length,
        type(tokenizer).__name__,
        backend.to_str(),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        *({name: value for name, value in row.items() if name not in ("domain", "where")} for row in rows),
    ):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _read(path: Path) -> Tensors:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # not a mapping
        if (file.metadata() or {}).get("sha256") != _digest(tensors):
            raise ValueError("checksum")
    return tensors


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _forget_oldest() -> None:
    """Several runs may do this at once: what another has removed is gone, which is all that is wanted."""
    entries = sorted(folder().glob("*.safetensors"), key=_last_used, reverse=True)
    for path in entries[KEEP:]:
        path.unlink(missing_ok=True)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
