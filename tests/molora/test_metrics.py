from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from molora import metrics
from molora.errors import UserError


def measured(loss: float, grad_norm: float = 1.0) -> metrics.Measured:
    one = torch.tensor(1.0)
    return metrics.Measured(
        loss=torch.tensor(loss),
        z_loss=one,
        load_balance=one,
        grad_norm=torch.tensor(grad_norm),
        load=torch.full((2, 4), 0.25),
        lr=0.5,
        tokens=10,
    )


def test_a_resumed_log_takes_back_later_lines_and_a_cut_one(tmp_path: Path) -> None:
    with metrics.Log(tmp_path, step=0) as log:
        for step in (1, 2, 3):
            log.write(step, loss=float(step))
        log.write(2, val_loss=0.5)
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    with metrics.Log(tmp_path, step=2) as log:
        log.write(3, loss=9.0)
    lines = metrics.read(tmp_path / metrics.FILE)
    assert lines == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "val_loss": 0.5},
        {"step": 3, "loss": 9.0},
    ]


def test_the_meter_averages_an_interval_and_starts_afresh() -> None:
    meter = metrics.Meter()
    for loss in (1.0, 3.0):
        meter.add(measured(loss))
    values, load = meter.read(2)
    assert values["loss"] == 2.0
    assert values["lr"] == 0.5
    assert load == [[0.25] * 4] * 2
    meter.add(measured(7.0))
    assert meter.read(3)[0]["loss"] == 7.0


@pytest.mark.parametrize(("name", "bad"), [("loss", math.nan), ("grad_norm", math.inf)])
def test_what_is_not_finite_stops_the_run_with_its_step(name: str, bad: float) -> None:
    meter = metrics.Meter()
    meter.add(measured(1.0))
    meter.add(measured(bad) if name == "loss" else measured(1.0, grad_norm=bad))
    meter.add(measured(1.0))
    with pytest.raises(UserError, match=f"{name} is {bad} at step 9"):
        meter.read(10)


def test_tensorboard_is_asked_for_by_name_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install"):
        metrics.Log(tmp_path, step=0, tensorboard=True)
