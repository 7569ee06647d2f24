from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from molora import metrics
from molora.data import Batch


def measured(loss: float, *, skipped: bool = False) -> metrics.Measured:
    one = torch.tensor(1.0)
    return metrics.Measured(
        batch_losses=torch.tensor([0.25 * loss, 0.75 * loss]),
        z_loss=one,
        load_balance=one,
        grad_norm=one,
        tensor_norms=torch.ones(2),
        skipped=torch.tensor(skipped),
        load=torch.full((2, 4), 1.0 if skipped else 0.25),
        tensors=["a", "b"],
        where=[["x:1"], ["x:2"]],
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
    interval = meter.read(2)
    assert interval.values()["loss"] == 2.0
    assert interval.values()["lr"] == 0.5
    assert interval.mean_load() == [[0.25] * 4] * 2
    meter.add(measured(7.0))
    assert meter.read(3).values()["loss"] == 7.0


def test_skipped_steps_are_left_out_of_the_means() -> None:
    meter = metrics.Meter()
    for loss in (1.0, math.nan, 3.0):
        meter.add(measured(loss, skipped=math.isnan(loss)))
    interval = meter.read(9)
    assert interval.values()["loss"] == 2.0
    assert interval.mean_load() == [[0.25] * 4] * 2
    assert [(step, skipped) for step, _, _, skipped in interval.steps()] == [(7, False), (8, True), (9, False)]
    meter.add(measured(math.nan, skipped=True))
    assert "loss" not in meter.read(10).values()


def test_waiting_for_data_is_a_share_of_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])

    def slow() -> Iterator[int]:
        for item in range(4):
            clock[0] += 1.0
            yield item

    meter = metrics.Meter()
    shares = []
    for item in meter.timing(slow()):
        clock[0] += 3.0
        meter.add(measured(1.0))
        if item % 2:
            shares.append(meter.read(item).values()["data_wait_share"])
    assert shares == [0.25, 0.25]


def test_domains_of_tokens_and_their_load() -> None:
    rows = [("maths", 3), ("general", 2), ("maths", 1)]
    domains = metrics.Domains(rows)
    assert domains.names == ["maths", "general"]
    ids = torch.zeros(2, 5, dtype=torch.int64)
    batch = Batch(ids, ids, ids, ids, 6, [], [], spans=[rows[:2], rows[2:]])
    assert domains.of_tokens(batch).tolist() == [[0, 0, 0, 1, 1], [0, -1, -1, -1, -1]]
    counts = torch.tensor([[[3.0, 4.0, 1.0]], [[0.0, 0.0, 0.0]]])
    assert domains.load(counts, ["r"], top_k=2) == {"maths": {"tokens": 4, "load": {"r": [0.375, 0.5, 0.125]}}}


def test_many_domains_are_the_most_frequent_and_the_rest() -> None:
    names = [f"d{i}" for i in range(20)]
    domains = metrics.Domains([(name, 1) for i, name in enumerate(names) for _ in range(20 - i)])
    assert domains.names == [*names[:7], metrics.OTHER]
    ids = torch.zeros(1, 3, dtype=torch.int64)
    batch = Batch(ids, ids, ids, ids, 3, [], [], spans=[[("d6", 1), ("d7", 1), ("d19", 1)]])
    assert domains.of_tokens(batch).tolist() == [[6, 7, 7]]


def test_an_interval_sums_the_domains_of_steps_that_were_not_skipped() -> None:
    meter = metrics.Meter()
    for skipped in (False, True, False):
        meter.add(replace(measured(1.0, skipped=skipped), domain_counts=torch.full((1, 2, 4), 1.0 + skipped)))
    assert meter.read(3).domain_counts().tolist() == [[[2.0] * 4] * 2]
    meter.add(measured(1.0))
    assert meter.read(4).domain_counts() is None
