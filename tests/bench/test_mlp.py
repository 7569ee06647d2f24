"""The harness: what is checked before it is timed, what a result says, and that a wrong variant gets no time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import mlp, peers, provenance, variants
from bench.__main__ import main
from bench.machine import Roofline
from bench.measure import Variant, saved_mib
from bench.problem import Problem, Shape, problem

# With 64 tokens two right fp32 results can differ by twice in error by luck; with 256, by a third in 16 seeds.
TINY = Shape(tokens=256, hidden=32, intermediate=48, experts=4, top_k=2, rank=4)
SIZES = {"tokens": 256, "hidden": 32, "intermediate": 48, "rank": 4, "rounds": 2, "warmup": 0, "threads": 1}
ARGUMENTS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
QUICK = [name for name in mlp.ENTRIES if name != "dense torch.compile"]  # compiling takes most of a minute


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_variant_keeps_to_its_definition(name: str, dtype: str) -> None:
    try:
        assert mlp.fault(name, replace(TINY, dtype=dtype)) is None
    except peers.Absent as reason:
        pytest.skip(str(reason))


def test_a_hidden_size_need_not_be_one_of_32_heads() -> None:
    assert mlp.fault("transformers LlamaMLP", replace(TINY, hidden=40)) is None


@pytest.mark.parametrize("shape", [replace(TINY, dropout=0.3), replace(TINY, top_k=1), replace(TINY, top_k=4)])
def test_molora_is_checked_as_it_is_measured(shape: Shape) -> None:
    assert mlp.fault("molora", shape) is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_yardstick_that_is_wrong_is_no_yardstick(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would find itself right, and whatever is as wrong."""

    def stronger(p: Problem, shape: Shape) -> Variant:
        return variants.naive(replace(p, scaling=1.2 * p.scaling), shape)

    entry = replace(mlp.ENTRIES["naive loop"], build=stronger, eager=stronger)
    monkeypatch.setitem(mlp.ENTRIES, "naive loop", entry)
    assert "times what is allowed" in (mlp.fault("naive loop", replace(TINY, dtype=dtype)) or "")


def off_by_a_thousandth(p: Problem, shape: Shape) -> Variant:
    right = variants.dense_eager(p, shape)
    return replace(right, forward=lambda x: 1.001 * right.forward(x))


def forgets_one_router(p: Problem, shape: Shape) -> Variant:
    right = variants.dense_eager(p, shape)
    return replace(right, leaves=[*right.leaves[:-2], *(torch.zeros_like(leaf) for leaf in right.leaves[-2:])])


@pytest.mark.parametrize("wrong", [off_by_a_thousandth, forgets_one_router])
def test_a_wrong_variant_gets_no_time_and_fails_the_run(
    wrong: variants.Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(mlp.ENTRIES, "molora", mlp.Entry(wrong))
    file = tmp_path / "result.json"
    assert main(["mlp", *ARGUMENTS, "--only", "molora", "--json", str(file)]) == 1
    result = json.loads(file.read_text())
    assert [row["variant"] for row in result["rows"]] == ["frozen base"]
    assert "times what is allowed" in result["wrong"]["molora"]
    assert "molora: wrong, not timed" in capsys.readouterr().out


def test_a_result_says_what_was_measured_and_how(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert main(["mlp", *ARGUMENTS, "--only", "molora", "naive loop", "Unsloth LoRA r=64", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["variant"] for row in result["rows"]] == ["frozen base", "molora", "naive loop"]
    for row in result["rows"]:
        assert {"fwd_ms", "bwd_ms", "total_ms", "ratio", "ratio_quartiles", "saved_mib"} <= row.keys()
    assert result["rows"][0]["ratio"] == 1
    assert result["not_measured"] == {"Unsloth LoRA r=64": "unsloth needs a CUDA device"}
    assert result["shape"]["seed"] == 0 and result["shape"]["tokens"] == 256
    assert {"commit", "command", "packages", "cpu", "gpu"} <= result["provenance"].keys()
    assert result["roofline"]["gflop_per_s"] > 0 and result["roofline"]["gbyte_per_s"] > 0


def test_a_sweep_that_is_stopped_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = mlp.measured

    def stopped(shape: Shape, *rest: Any) -> dict[str, Any]:
        if shape.experts > 2:
            raise KeyboardInterrupt
        return measured(shape, *rest)

    monkeypatch.setattr(mlp, "measured", stopped)
    file = tmp_path / "sweep.json"
    with pytest.raises(KeyboardInterrupt):
        main(["sweep", "--over", "experts", *ARGUMENTS, "--only", "molora", "--json", str(file)])
    assert [run["shape"]["experts"] for run in json.loads(file.read_text())["runs"]] == [2]


def test_without_git_the_commit_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_git", lambda *_: None)
    monkeypatch.delenv("MOLORA_COMMIT", raising=False)
    assert provenance.provenance()["commit"] is None
    monkeypatch.setenv("MOLORA_COMMIT", "0123456789")
    assert provenance.commit_of(provenance.provenance()) == "commit `0123456`"


def test_a_command_does_not_say_where_its_result_lay(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["python", "-m", "bench", "mlp", "--json", "/some/where/a.json", "--markdown=/else/b.md", "--tokens", "64"]
    monkeypatch.setattr(sys, "orig_argv", words)
    said = provenance.provenance()["command"]
    assert said == "python -m bench mlp --json a.json --markdown=b.md --tokens 64"


def test_kernels_are_measured_without_pydantic() -> None:
    """Only the training step needs molora's configuration."""
    script = "import sys; sys.modules['pydantic'] = None; import bench.mlp, bench.op, bench.sweep, bench.compile"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_saved_bytes_are_counted_once_and_without_weights() -> None:
    shape = Shape(tokens=256, hidden=128, intermediate=512)
    p = problem(shape)
    # gate's output, silu's and up's, each (256, 512) fp32; a linear with a frozen weight keeps no input.
    assert saved_mib(variants.frozen(p, shape), p.x, p.weights()) == 1.5


def test_floors_are_those_of_the_block_they_are_printed_for() -> None:
    # One side of the roofline far away leaves the other alone.
    only_flops = mlp.floors(Shape(), Roofline(gbyte_per_s=1e12, gflop_per_s=1))
    assert only_flops["flops_dense"] == only_flops["roofline_dense"] == pytest.approx(1.256, abs=0.001)
    assert only_flops["flops_sparse"] == only_flops["roofline_grouped"] == pytest.approx(1.128, abs=0.001)
