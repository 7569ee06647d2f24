"""Data sets of the Hugging Face hub, or copies of them on disk, through the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.errors import UserError
from molora.files import file_sha256

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
"""Endings of files that hold rows, and the library's name for their format."""


@dataclass(frozen=True)
class Source:
    """Which data set: a name on the hub, or a folder that a person downloaded it to."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str = "main"
    """Branch, tag or commit; a branch is resolved to its commit before anything is read."""
    path: Path | None = None
    """A local copy, read instead of the hub."""


@dataclass(frozen=True)
class Loaded:
    rows: Any
    """A ``datasets.Dataset``."""
    provenance: dict[str, Any]
    """What was read, for a manifest."""


def source_of(given: str, name: str, config: str | None, revision: str, split: str = "train") -> Source:
    """What a command line names: a set on the hub, or a path to a copy of the set ``name``."""
    path = Path(given).expanduser()
    # "folder/file" could be both; what is on the disk is meant, and so is what is written as a path.
    if path.exists() or given.count("/") != 1 or given.startswith((".", "/", "~")) or path.suffix in FORMATS:
        return Source(name, config, split, revision, path)
    return Source(given, config, split, revision)


def load(source: Source, columns: Sequence[str] = ()) -> Loaded:
    """The rows of a data set, with ``columns`` only if any are named.

    Raises :class:`UserError` when the library, the network, the set or a column is missing, with the way round it.
    """
    datasets = _library()
    described = {"set": source.name, "config": source.config, "split": source.split}
    if source.path is not None:
        rows = _load_local(datasets, source)
        described |= {"read_from": str(source.path), "sha256": _hashes(source.path)}
    else:
        commit = _commit(source)
        rows = _load_hub(datasets, source, commit)
        described |= {"revision": commit}
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{source.path or source.name}: has no column {', '.join(missing)}; its columns are "
            f"{', '.join(rows.column_names)}"
        )
    return Loaded(rows.select_columns(list(columns)) if columns else rows, described)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("reading data sets needs the package datasets: pip install datasets") from None
    return datasets


def _load_local(datasets: Any, source: Source) -> Any:
    path = source.path
    assert path is not None
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; it should be a copy of the data set: {_how_to_copy(source)}")
    if path.is_file() and path.suffix not in FORMATS:
        raise UserError(f"{path}: ends in none of {', '.join(FORMATS)}, and is no folder of such files")
    try:
        if path.is_dir():
            return datasets.load_dataset(str(path), source.config, split=source.split)
        return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # the library raises what its readers raise, and every reader has its own
        raise UserError(f"{path}: cannot be read as a data set ({_short(error)})") from error


def _hashes(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.suffix in FORMATS) if path.is_dir() else [path]
    return {str(file.relative_to(path)) if path.is_dir() else file.name: file_sha256(file) for file in files}


def _commit(source: Source) -> str:
    """The commit that the revision names today, so that what is written down can be read again."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return HfApi().dataset_info(source.name, revision=source.revision, timeout=30).sha or source.revision
    except OfflineModeIsEnabled:
        return source.revision  # HF_HUB_OFFLINE=1 asks for the cache
    except GatedRepoError as error:
        raise UserError(
            f"{source.name}: asks for its conditions to be accepted; do so on https://huggingface.co/datasets/"
            f"{source.name} and log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{source.name}: the hub has no such data set, or it is private (then log in with: hf auth login)"
        ) from error
    except Exception as error:  # transport errors have no common base across versions of the hub's client
        raise UserError(
            f"{source.name}: the hub cannot be reached ({_short(error)}); on a machine with a network, "
            f"{_how_to_copy(source)}"
        ) from error


def _load_hub(datasets: Any, source: Source, commit: str) -> Any:
    try:
        return datasets.load_dataset(source.name, source.config, split=source.split, revision=commit)
    except Exception as error:  # as above
        raise UserError(
            f"{source.name}: cannot be loaded ({_short(error)}); where the network is the reason, "
            f"{_how_to_copy(source)}"
        ) from error


def _how_to_copy(source: Source) -> str:
    return (
        f"copy it with: hf download {source.name} --repo-type dataset --local-dir COPY; then give the folder COPY "
        "in place of the name"
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
