"""The output folder of a run: what a checkpoint holds, how it is written whole or not at all, how a run goes on.

    <output>/checkpoint-<step>/   adapter, tokenizer, config.yml, provenance.json, SHA256SUMS, training_state.pt
    <output>/checkpoint-best/     the same without training state: lowest validation loss so far
    <output>/final/               the same without training state: the hand-over to the next stage; the run is finished

A folder is written aside, flushed to the disk and renamed, so that a folder that has its name is complete; a file
damaged later is found by its checksum. ``sha256sum -c SHA256SUMS`` checks one by hand.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molora import adapter, metrics, trackers
from molora.config import Config, load, to_yaml
from molora.distributed import World, like, whole
from molora.errors import UserError
from molora.files import file_sha256

FINAL = "final"
BEST = "checkpoint-best"
CONFIG = "config.yml"
PROVENANCE = "provenance.json"
_STATE = "training_state.pt"
_SUMS = "SHA256SUMS"
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_ASIDE = re.compile(r"\.(final|checkpoint-(?:best|\d+))\.(tmp|old)")

# Keys that a resumed run may change: they alter where it runs and what it writes, not what it computes.
_MAY_CHANGE = re.compile(
    r"device|logging\..*|data\.cache|training\.(parallel|batch_size|grad_accum_steps|num_workers|save_steps|save_total_limit|log_steps|max_skipped_steps)"
)

_log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    rows: int = 0
    """Rows consumed (with ``data.packing``, packed sequences): the position in the data order."""
    best_loss: float | None = None
    """Lowest validation loss so far."""
    skipped: int = 0
    """Steps that changed nothing, because their loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """How many of them were the last ones."""


# --- the output folder -------------------------------------------------------------------------------------------


def finished(output: Path) -> bool:
    """Whether ``output`` holds a run that came to its end."""
    return (output / FINAL).is_dir()


def claim(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise :class:`UserError` unless a run may write to ``output``; changes nothing."""
    try:
        existing = next(path for path in (output.absolute(), *output.absolute().parents) if os.path.lexists(path))
        output.exists()  # says whether the name is one
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; choose another --output-dir") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{output}: cannot be written in {existing}; choose another --output-dir")
    if resume or overwrite:
        return
    if finished(output):
        raise UserError(f"{output}: holds a finished run; choose another --output-dir, or give --overwrite")
    if any(_of_a_run(output)):
        raise UserError(
            f"{output}: holds an unfinished run; give --resume to continue it, --overwrite to discard it, "
            "or choose another --output-dir"
        )


def clear(output: Path) -> None:
    """Remove what a run writes from ``output``; other files stay."""
    for path in list(_of_a_run(output)):
        _remove(path)


def _remove(path: Path) -> None:
    """A link goes, what it points to stays: nothing outside the output folder is ever removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe(output: Path, config: Config, provenance: dict[str, Any]) -> None:
    """Write the resolved configuration and the provenance of a run to ``output``, which is created."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # such as a file system that says it can be written and cannot
        raise UserError(f"{output}: cannot be made ({error.strerror}); choose another --output-dir") from error
    (output / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    (output / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _of_a_run(output: Path) -> Iterator[Path]:
    names = {FINAL, BEST, CONFIG, PROVENANCE, metrics.FILE, *trackers.FOLDERS}
    for path in output.iterdir() if output.is_dir() else ():
        if path.name in names or _NUMBERED.fullmatch(path.name) or _ASIDE.fullmatch(path.name):
            yield path


# --- writing -----------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    provenance: dict[str, Any],
    state: dict[str, Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write ``folder``, replacing an older one of that name, with ``state`` (:func:`training_state`) if given, and the
    adapter's tensors as in ``weights`` where the model's own are spread over processes.

    Raises :class:`UserError` when the disk is full or refuses; nothing written before is touched then.
    """
    with _whole(folder) as aside:
        adapter.save_adapter(model, aside, weights)
        tokenizer.save_pretrained(aside)
        describe(aside, config, provenance)
        if state is not None:
            torch.save(state, aside / _STATE)


def training_state(progress: Progress, optimizer: Optimizer, schedule: LambdaLR, world: World) -> dict[str, Any]:
    """Everything beside the weights that the rest of the run depends on, as tensors and plain data; whole, however it
    is spread over processes, all of which must call this."""
    return {
        "progress": asdict(progress),
        "optimizer": whole(optimizer.state_dict(), world),
        "schedule": schedule.state_dict(),
    }


def prune(output: Path, limit: int | None, step: int) -> None:
    """Of the ``checkpoint-<step>`` folders up to ``step``, where the run is, keep the newest ``limit``; None keeps all.

    Later ones are damaged, or the run would have gone on from them: they do not count."""
    if limit is not None:
        for folder in [folder for folder in _numbered(output) if _step(folder) <= step][limit:]:
            _remove(folder)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    aside, replaced = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        _remove(aside)
        aside.mkdir(parents=True)
        yield aside
        _write_sums(aside)
        for path in (*aside.iterdir(), aside):
            _flush(path)
        if folder.exists():
            folder.rename(replaced)
        aside.rename(folder)
        _flush(folder.parent)
        with suppress(OSError):
            _remove(replaced)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors wrap a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{folder}: cannot be saved ({error}); older checkpoints are whole, --resume continues"
        ) from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_sums(folder: Path) -> None:
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / _SUMS).write_text("".join(lines), encoding="utf-8")


# --- going on ----------------------------------------------------------------------------------------------------


def newest(output: Path) -> Path | None:
    """The newest ``checkpoint-<step>`` whose files have their checksums, or None if there is none; damaged ones are
    warned of, and :class:`UserError` if all are: to start again would discard what is left of them.

    Clears away first what a crash while saving left aside.
    """
    _tidy(output)
    damaged: list[str] = []
    for folder in _numbered(output):
        why = _damaged(folder)
        if why is None:
            for told in damaged:
                _log.warning("warning: %s; %s is used", told, folder.name)
            return folder
        damaged.append(f"{folder} is damaged ({why})")
    if damaged:
        raise UserError(
            f"no checkpoint is whole: {'; '.join(damaged)}; restore one of them, or give --overwrite instead of "
            "--resume to start again"
        )
    return None


def check_same_run(folder: Path, config: Config, provenance: dict[str, Any]) -> None:
    """Raise :class:`UserError` if the checkpoint's run had other settings or other data than this one, or if this
    process does not see ``folder``, which the first one found."""
    if not folder.is_dir():
        raise UserError(f"{folder}: this process does not see it; give an --output-dir that all machines see")
    before, now = _flat(load(folder / CONFIG).model_dump()), _flat(config.model_dump())
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not _MAY_CHANGE.fullmatch(key):
            raise UserError(
                f"{folder}: was trained with {key}={before.get(key)}, now it is {now.get(key)}; "
                "set it back, or start another run in another --output-dir"
            )
    saved = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    rows_before = _rows_per_step(before, saved["processes"])
    rows_now = _rows_per_step(now, provenance["processes"])
    if rows_before != rows_now:
        raise UserError(
            f"{folder}: a step was of {rows_before} rows (training.batch_size x training.grad_accum_steps x "
            f"{saved['processes']} processes), now it is of {rows_now}; set batch_size and grad_accum_steps so that it "
            "is the same, or start another run in another --output-dir"
        )
    if saved["data"] != provenance["data"]:
        raise UserError(f"{folder}: the data files have changed since; restore them, or start another run")


def restore(folder: Path, optimizer: Optimizer, schedule: LambdaLR) -> Progress:
    """Put optimizer and schedule back to where :func:`save` found them; the weights are loaded before the model is
    spread over processes, and what is random follows from seed, process and step.

    Raises :class:`UserError` for a state that molora did not write; code that such a file may hold is not run.
    """
    try:
        state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder / _STATE}: not a state that molora wrote ({reason}); remove {folder.name}") from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, moments in state["optimizer"]["state"].items():
        state["optimizer"]["state"][i] = {name: like(value, parameters[i]) for name, value in moments.items()}
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return Progress(**state["progress"])


def _numbered(output: Path) -> list[Path]:
    """``checkpoint-<step>`` folders, newest first."""
    found = [path for path in output.iterdir() if _NUMBERED.fullmatch(path.name)] if output.is_dir() else []
    return sorted(found, key=_step, reverse=True)


def _step(numbered: Path) -> int:
    return int(numbered.name.removeprefix("checkpoint-"))


def _tidy(output: Path) -> None:
    """Undo what a crash while saving left: half-written folders go, replaced ones not yet followed come back."""
    for path in list(output.iterdir()) if output.is_dir() else ():
        if match := _ASIDE.fullmatch(path.name):
            folder = output / match[1]
            if match[2] == "old" and not folder.exists():
                path.rename(folder)
            else:
                _remove(path)


def _damaged(folder: Path) -> str | None:
    """What is wrong with the folder's files, or None."""
    try:
        lines = (folder / _SUMS).read_text(encoding="utf-8").splitlines()
        for line in lines:
            digest, name = line.split("  ", 1)
            if file_sha256(folder / name) != digest:
                return f"checksum of {name}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None if lines else f"{_SUMS} is empty"


def _rows_per_step(flat: dict[str, Any], processes: int) -> int:
    return flat["training.batch_size"] * flat["training.grad_accum_steps"] * processes


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat
