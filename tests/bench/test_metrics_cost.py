"""The benchmark of the metrics' cost, on a model of no size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import step
from bench.__main__ import main


def test_both_levels_take_every_window(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    monkeypatch.setitem(step.MODELS, "tiny", step.MODELS["tiny"] | sizes)
    file = tmp_path / "cost.json"
    arguments = ["--rounds", "3", "--warmup", "1", "--json", str(file), "--set", "training.batch_size=1"]
    assert main(["metrics", *arguments]) == 0
    result = json.loads(file.read_text())
    low, high = result["interval"]
    assert low <= result["ratio"] <= high
    assert len(result["minimal"]) == len(result["advanced"]) == 4
    assert "median of 3 pairs" in capsys.readouterr().out
