"""TensorBoard and Weights & Biases as they are: what a run gave them is read back from their own files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molora import checkpoint, config, metrics, trackers, train
from molora.errors import UserError


def write_as_a_run_that_was_killed(settings: config.Config, output: Path) -> None:
    """Steps 1 to 3, the last one after the checkpoint of step 2; then 3 and 4 of the run that goes on from there."""
    for start, steps, value in ((0, (1, 2, 3), 0.5), (2, (3, 4), 0.25)):
        with metrics.Log(output, step=start, trackers=trackers.opened(settings, output, start)) as log:
            for step in steps:
                log.write(step, loss=step + value, load={"router": [0.5, 0.5]})
            log.write(steps[0], warning="no number")
            log.write(steps[-1], val_loss=value)


def test_tensorboard_has_the_curves_of_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_as_a_run_that_was_killed(config.load(None, ["logging.tensorboard=true"]), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss", "val_loss"]
    curves = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in ("loss", "val_loss")}
    lines = metrics.read(tmp_path / metrics.FILE)
    assert curves == {name: [(line["step"], line[name]) for line in lines if name in line] for name in curves}
    assert curves["loss"] == [(1, 1.5), (2, 2.5), (3, 3.25), (4, 4.25)]


def test_wandb_has_one_run_that_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = config.load(None, ["logging.wandb=true", "seed=7"])
    write_as_a_run_that_was_killed(settings, tmp_path / "mine")
    # By content, and waited for: W&B's own process writes the files, when it comes to it.
    deadline, written = time.monotonic() + 60, list[list[Any]]()
    while [len(history(of)) for of in written] not in ([3, 2], [2, 3]) and time.monotonic() < deadline:
        time.sleep(0.1)
        written = [list(records(path)) for path in tmp_path.glob("mine/wandb/offline-run-*/*.wandb")]
    killed, resumed = sorted(written, key=lambda of: history(of)[0]["_step"])
    assert history(killed) == [
        {"_step": 1, "loss": 1.5},
        {"_step": 2, "loss": 2.5},
        {"_step": 3, "loss": 3.5, "val_loss": 0.5},
    ]
    assert history(resumed) == [{"_step": 3, "loss": 3.25}, {"_step": 4, "loss": 4.25, "val_loss": 0.25}]
    first, second = (next(r.run for r in of if r.WhichOneof("record_type") == "run") for of in (killed, resumed))
    assert first.run_id == second.run_id
    assert (first.project, first.display_name) == ("molora", "mine")
    assert {item.key: json.loads(item.value_json) for item in first.config.update}["seed"] == 7

    checkpoint.clear(tmp_path / "mine")  # a run that begins anew is another one
    assert list((tmp_path / "mine").iterdir()) == []


def history(records: list[Any]) -> list[dict[str, float]]:
    found = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found.append({name: row[name] for name in ("_step", "loss", "val_loss") if name in row})
    return found


def records(path: Path) -> Iterator[Any]:
    """The records of W&B's file: after a head of 7 bytes LevelDB's log format, blocks of 32 KiB of chunks of records,
    each chunk with (crc, length, whether it is all, the first, a middle or the last of its record)."""
    from wandb.proto import wandb_internal_pb2

    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # a block's rest is too short for a head
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if at + 7 + length > len(content):  # not all written yet
            return
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_one_that_is_missing_is_asked_for_before_a_model_is_loaded(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    settings = config.load(None, [f"logging.{name}=true", "device=cpu", "model_name=missing"])
    with pytest.raises(UserError, match=rf"logging.{name} needs the package {name}: pip install 'molora\[track\]'"):
        train.check_inputs(settings, tmp_path)


def test_wandb_that_cannot_take_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"No API key configured\..*wandb login"):
        trackers.WandB(tmp_path, config.Config())
