"""Operations, steps and sweeps at tiny shapes: everything that the GPU's commands run, on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import op, peers, step
from bench.__main__ import main
from bench.problem import Shape

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.MODELS, "tiny", TINY)


@pytest.mark.parametrize("name", step.STEPS)
def test_every_step_keeps_to_its_reference(name: str) -> None:
    try:
        assert step.fault(name, step.Shape(rank=4)) is None
    except peers.Absent as reason:
        pytest.skip(str(reason))


def silent_experts(base: Any, shape: step.Shape) -> step.Step:
    made = step.molora()(base, shape)
    for module in made.model.modules():
        if hasattr(module, "lora_b"):
            module.forward = module.base.forward
    return made


def test_a_wrong_step_gets_no_time_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(step.STEPS, "eulerforge", silent_experts)  # held to molora's own mathematics
    file = tmp_path / "step.json"
    arguments = ["--rows", "1", "--length", "16", "--rounds", "1", "--warmup", "0", "--threads", "1", "--rank", "4"]
    assert main(["step", *arguments, "--only", "eulerforge", "--json", str(file)]) == 1
    result = json.loads(file.read_text())
    assert [row["variant"] for row in result["rows"]] == ["frozen base"]
    assert "times what is allowed" in result["wrong"]["eulerforge"]


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
def test_a_step_says_what_it_took(checkpointing: str, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    arguments = ["--rows", "2", "--length", "16", "--rounds", "2", "--warmup", "1", "--threads", "1", "--rank", "4"]
    arguments += ["--checkpointing", checkpointing, "--dtype", "bf16", "--only", "molora"]
    assert main(["step", *arguments, "--json", str(file)]) == 0
    base, ours = json.loads(file.read_text())["rows"]
    assert base["trained"] == 0 and "update_ms" not in base
    # two layers: three mixtures of 4 experts and their routers, four plain LoRAs, all of rank 4
    mlp = 3 * 4 * 4 * (32 + 48) + (4 * 32 + 4) * 2 + 4 * 48 + 4
    attention = 4 * (2 * (32 + 32) + 2 * (32 + 16))
    assert ours["trained"] == 2 * (mlp + attention)
    assert ours["tokens_per_s"] > 0 and ours["update_ms"] > 0 and ours["static_mib"] > base["static_mib"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_operation_keeps_to_its_reference(dtype: str) -> None:
    shape = Shape(tokens=64, hidden=32, intermediate=48, rank=4, dtype=dtype)
    for name, case in op.cases(shape).items():
        assert op.faults(case, shape) == {}, name


def test_a_wrong_operation_is_found() -> None:
    shape = Shape(tokens=64, hidden=32, intermediate=48, rank=4)
    case = op.cases(shape)["gate/up"]
    wrong = replace(case, ways=case.ways | {"molora": case.ways["frozen linears"]})
    found = op.faults(wrong, shape)
    assert list(found) == ["molora"] and "times what is allowed" in found["molora"]


def test_operations_have_their_floors(tmp_path: Path) -> None:
    file = tmp_path / "op.json"
    sizes = ["--tokens", "64", "--hidden", "32", "--intermediate", "48", "--rank", "4"]
    assert main(["op", *sizes, "--rounds", "1", "--warmup", "0", "--threads", "1", "--json", str(file)]) == 0
    cases = json.loads(file.read_text())["cases"]
    assert list(cases) == ["router", "gate/up", "down", "q/k/v"]
    for case in cases.values():
        for ours in (row for row in case["rows"] if row["variant"].startswith("molora")):
            assert len(ours["gflop"]) == len(ours["gbyte"]) == len(ours["share"]) == 2
            assert 0 < sum(ours["spent"].values()) <= 1.001
    dense, chosen = (row for row in cases["down"]["rows"] if row["variant"].startswith("molora"))
    assert dense["gflop"] > chosen["gflop"]


def test_a_sweep_measures_each_value(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    sizes = ["--tokens", "32", "--hidden", "16", "--intermediate", "24", "--rank", "4"]
    run = ["--rounds", "1", "--warmup", "0", "--threads", "1", "--only", "molora dense", "--json", str(file)]
    assert main(["sweep", "--over", "experts", "--values", "2", "3", *sizes, *run]) == 0
    result = json.loads(file.read_text())
    assert [r["shape"]["experts"] for r in result["runs"]] == [2, 3]
    assert main(["sweep", "--over", "layers", "--values", "1", "--only", "molora", *run[:6], *run[8:]]) == 0
    assert json.loads(file.read_text())["runs"][0]["shape"]["layers"] == 1
