"""Where a run's numbers go beside ``metrics.jsonl``, which stays the truth: TensorBoard and Weights & Biases (W&B).

What they keep lies in ``<output>/tensorboard`` and ``<output>/wandb``; a resumed run goes on in the same curves there.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from molora.config import Config, Logging
from molora.errors import UserError
from molora.files import write_text

TENSORBOARD, WANDB = "tensorboard", "wandb"
FOLDERS = (TENSORBOARD, WANDB)


class Tracker(Protocol):
    """What a log writes to, line by line."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a line."""
        ...

    def close(self, *, failed: bool) -> None:
        """The run ended, by an error if ``failed``."""
        ...


def opened(config: Config, output: Path, step: int) -> list[Tracker]:
    """The trackers that ``config`` asks for, for a run in ``output`` that is at ``step``.

    Raises :class:`UserError` for one that is not installed or cannot be reached.
    """
    made: list[Tracker] = []
    if config.logging.tensorboard:
        made.append(TensorBoard(output / TENSORBOARD, step))
    if config.logging.wandb:
        made.append(WandB(output, config))
    return made


def require(settings: Logging) -> None:
    """Raise :class:`UserError` for a tracker that is asked for and not installed."""
    for asked, module in ((settings.tensorboard, _tensorboard), (settings.wandb, _wandb)):
        if asked:
            module()


def log_in(settings: Logging) -> None:
    """Ask W&B, if it is asked for, whether it knows the user; at a terminal it asks back. Before a run touches what an
    earlier one left. Raises :class:`UserError` if nobody is logged in."""
    if settings.wandb:
        wandb = _wandb()
        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise _refused(error) from error


class TensorBoard:
    """``tensorboard --logdir <output>`` shows it. What an interrupted run wrote after its checkpoint is taken back."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = _tensorboard().SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of W&B, whose own variables say where it goes: ``WANDB_PROJECT`` (without it ``molora``), ``WANDB_ENTITY``,
    and ``WANDB_MODE=offline`` for a folder that ``wandb sync`` sends later.

    W&B takes nothing back: steps after the checkpoint that it has been given already keep their first values; those
    that the resumed run computes are the same, speeds aside.
    """

    def __init__(self, output: Path, config: Config) -> None:
        wandb = _wandb()
        name = output / WANDB / "run-id"
        if not name.exists():
            write_text(name, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                dir=output,
                id=name.read_text(encoding="utf-8"),
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", "molora"),
                name=os.environ.get("WANDB_NAME", output.resolve().name),
                config=config.model_dump(),
                allow_val_change=True,  # a resumed run may log elsewhere, on another device
                settings=wandb.Settings(console="off"),  # the terminal's lines are in no need of a copy
            )
        except wandb.errors.Error as error:
            raise _refused(error) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _refused(error: Exception) -> UserError:
    return UserError(
        f"logging.wandb: W&B does not take the run ({error}); run `wandb login` once, or set WANDB_MODE=offline"
    )


def _tensorboard() -> Any:
    return _module("torch.utils.tensorboard", TENSORBOARD)


def _wandb() -> Any:
    return _module("wandb", WANDB)


def _module(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"logging.{key} needs the package {key}: pip install 'molora[track]'") from None
