"""The ways to add the experts to a frozen projection: one result, and what is wrong gets no time."""

from __future__ import annotations

import json

import torch

from bench import expand
from bench.__main__ import main

ARGUMENTS = ["expand", "--tokens", "8", "--columns", "4", "--rounds", "1", "--warmup", "0"]


def test_every_way_is_right_and_timed(tmp_path):
    path = tmp_path / "expand.json"
    assert main([*ARGUMENTS, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [(case["k"], case["n"]) for case in result["cases"]] == [(1024, 2816), (2816, 1024)]
    for case in result["cases"]:
        assert [row["variant"] for row in case["rows"]] == [
            "frozen alone", "beside it, after", "beside it, first", "more columns", "columns; rows backward",
        ]  # fmt: skip
        assert not case["wrong"]


def test_a_wrong_way_gets_no_time(monkeypatch, tmp_path, capsys):
    ways = expand._ways

    def bent(of):
        made = ways(of)
        forward, backward = made["more columns"]
        return made | {"more columns": (lambda: forward() + (of["x"].dtype == torch.float32), backward)}

    monkeypatch.setattr(expand, "_ways", bent)
    path = tmp_path / "expand.json"
    assert main([*ARGUMENTS, "--json", str(path)]) == 1
    for case in json.loads(path.read_text())["cases"]:
        assert "y" in case["wrong"]["more columns"]
        assert "more columns" not in [row["variant"] for row in case["rows"]]
    assert "more columns: not measured, wrong" in capsys.readouterr().out
