"""The pages say what the results say; tables and plots of every kind can be made."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import mlp, plots, report, step, sweep, tables
from bench.__main__ import main
from bench.all import commands


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_pages_equal_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.MARKED.search(text), "no table is marked"
    assert tables.fill(text, report.load()) == text, "run python -m bench report"


def test_a_changed_number_is_put_right() -> None:
    results: Any = copy.deepcopy(report.load())
    page = report.PAGES[0].read_text(encoding="utf-8")
    next(row for row in results["mlp-cpu-fp32"]["rows"] if row["variant"] == "molora")["ratio"] = 98.76
    assert "98.76" in tables.fill(page, results)


def test_without_results_every_table_says_so() -> None:
    for page in report.PAGES:
        filled = tables.fill(page.read_text(encoding="utf-8"), {})
        for name in tables.BLOCKS:
            if f"bench:{name} " in filled:
                block = filled.split(f"<!-- bench:{name} -->")[1].split("<!-- /bench")[0]
                assert "ot measured" in block, name


def test_a_reason_for_what_has_no_time_is_on_the_page() -> None:
    results: Any = copy.deepcopy(report.load())
    results["mlp-cpu-fp32"]["not_measured"] = {"mixlora": "mixlora is not installed"}
    assert "mixlora: not measured, mixlora is not installed" in tables.origin_cpu(results)


def test_a_copy_that_does_not_know_its_commit_is_shown_too() -> None:
    results: Any = copy.deepcopy(report.load())
    results["mlp-cpu-fp32"]["provenance"]["commit"] = None
    assert "commit unknown" in tables.origin_cpu(results)


def test_what_has_no_shape_is_left_out(tmp_path: Path) -> None:
    """``bench compile`` and ``bench metrics`` may write to the same folder."""
    for name in ("mlp-cpu-fp32", "sweep-cpu-fp32-rank"):
        shutil.copy(report.RESULTS / f"{name}.json", tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"op": "metrics", "ratio": 1.0}))
    (tmp_path / "compile.json").write_text(json.dumps({"runs": [{"commit": "0"}], "columns": [], "rows": []}))
    (tmp_path / "list.json").write_text("[]")
    results = report.load(tmp_path)
    assert list(results) == ["mlp-cpu-fp32", "sweep-cpu-fp32-rank"]
    assert "`mlp-cpu-fp32`" in tables.origin_cpu(results)


def test_a_result_that_is_cut_off_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlp-cpu-fp32.json").write_text('{"op": "ml')
    monkeypatch.setattr(report, "load", functools.partial(report.load, tmp_path))
    assert main(["report"]) == 2
    assert f"error: {tmp_path}/mlp-cpu-fp32.json: is no JSON" in capsys.readouterr().err


ROW = {"fwd_ms": 1.0, "bwd_ms": 2.0, "total_ms": 3.0, "ratio_quartiles": [1.0, 1.3], "saved_mib": 1.0}


def synthetic_sweep(over: str) -> dict[str, Any]:
    runs = []
    for value in (2, 4, 8):
        shape = {"tokens": 64, "hidden": 8, "experts": 8, "top_k": 2, "rank": 4, "dtype": "fp32", "device": "cpu"}
        shape |= {over: value, "config": {"hidden_size": 8}}
        names = ("frozen base", "molora", "molora dense", "molora grouped")
        rows = [ROW | {"variant": name, "ratio": 1 + 0.1 * i * value} for i, name in enumerate(names)]
        rows[3]["total_ms"] = 2.0
        floors = {"flops_dense": 1.2, "flops_sparse": 1.1, "roofline_dense": 1.3, "roofline_grouped": 1.4}
        run = {"shape": shape, "rows": rows, "chosen_form": "dense", "floors": floors}
        runs.append(run)
    machine = {"cpu": "Intel(R) Xeon(R) Processor, avx512f", "gpu": None}
    return {"op": "sweep", "over": over, "threads": 1, "runs": runs, "provenance": machine}


def test_plots_are_drawn_for_every_sweep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = {f"sweep-cpu-fp32-{over}": synthetic_sweep(over) for over in sweep.VALUES}
    drawn = plots.draw(results, tmp_path)
    assert [path.name for path in drawn] == ["cpu-tokens.png", "cpu-sweeps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plots._title(results["sweep-cpu-fp32-rank"]).endswith("T = 64, E = 8, k = 2\nIntel Xeon Processor")


def test_what_the_dispatch_rule_loses_is_shown() -> None:
    block = tables.BLOCKS["dispatch-cpu"]({"sweep-cpu-fp32-rank": synthetic_sweep("rank")})
    assert "| fp32 | 64 | 8 | 2 | 2 | 1.40 | 1.60 | dense | 50 % |" in block  # 3 ms taken, 2 ms to be had


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_of_all_are_ones_that_exist(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["all", "--device", device, "--list"]) == 0
    listed = capsys.readouterr().out
    for name, arguments in commands(device):
        assert f"bench/results/{name}.json" in listed
        known = step.STEPS if arguments[0] == "step" else mlp.ENTRIES
        if "--only" in arguments:
            assert set(arguments[arguments.index("--only") + 1 :]) <= known.keys()
