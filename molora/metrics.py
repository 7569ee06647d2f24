"""What a run measures: gathered on the device step by step, written to ``metrics.jsonl`` and, if asked, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from molora.errors import UserError

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Measured:
    """One optimizer step; the tensors are scalars on the device, without graph."""

    loss: Tensor
    """Cross-entropy per label token, in nats, without the router losses."""
    z_loss: Tensor
    load_balance: Tensor
    grad_norm: Tensor
    """2-norm of the whole gradient before clipping."""
    load: Tensor
    """(routers, E): share of the choices that went to each expert; rows sum to 1."""
    lr: float
    tokens: int
    """Tokens that are not padding."""


class Meter:
    """Holds what steps measured until it is read: once per interval, so that the device is waited for only then."""

    def __init__(self) -> None:
        self._steps: list[Measured] = []
        self._started = time.perf_counter()

    def add(self, measured: Measured) -> None:
        self._steps.append(measured)

    def restart_clock(self) -> None:
        """Leave the time since the last reading (evaluation, saving) out of the next interval's speed."""
        self._started = time.perf_counter()

    def read(self, step: int) -> tuple[dict[str, float], list[list[float]]]:
        """Means over the interval that ends after step ``step``, and the last step's load (routers, E).

        Raises :class:`UserError` naming the first step whose loss or gradient is not finite.
        """
        steps, self._steps = self._steps, []
        names = ("loss", "z_loss", "load_balance", "grad_norm")
        columns = torch.stack([torch.stack([getattr(m, name).float() for name in names]) for m in steps]).cpu()
        seconds = time.perf_counter() - self._started
        self.restart_clock()
        for at, values in enumerate(columns.tolist(), start=step - len(steps) + 1):
            for name, value in zip(names, values, strict=True):
                if not math.isfinite(value):
                    raise UserError(
                        f"{name} is {value} at step {at}: training stopped, no checkpoint holds what came of it; "
                        "lower training.lr or mend the rows around that step, and train again"
                    )
        means: dict[str, float] = dict(zip(names, columns.double().mean(dim=0).tolist(), strict=True))
        means["lr"] = steps[-1].lr
        means["tokens_per_second"] = sum(m.tokens for m in steps) / seconds
        means["seconds_per_step"] = seconds / len(steps)
        return means, [[round(share, 4) for share in router] for router in steps[-1].load.tolist()]


class Log:
    """Appends to ``folder/metrics.jsonl``; a resumed run goes on as if it had never stopped.

    Lines of steps after ``step``, written by the interrupted run but not part of its checkpoint, are taken back
    first, as is a last line that was cut by a crash. Use as a context manager. Raises :class:`UserError` when
    ``tensorboard`` is asked for and not installed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False) -> None:
        path = folder / FILE
        _keep_up_to(path, step)
        self._board = _open_tensorboard(folder / "tensorboard", step) if tensorboard else None
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, **values: Any) -> None:
        """One line with ``step`` and ``values``; numbers go to TensorBoard too."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without a last one that a crash has cut."""
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def _keep_up_to(path: Path, step: int) -> None:
    if path.exists():
        kept = [entry for entry in read(path) if entry["step"] <= step]
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        aside.replace(path)


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("logging.tensorboard needs the package tensorboard: pip install 'molora[track]'") from None
    return SummaryWriter(str(folder), purge_step=step + 1)
