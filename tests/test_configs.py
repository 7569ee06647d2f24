"""Every preset is valid, and the reasoning presets hold the tutorial's numbers."""

from __future__ import annotations

import os
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from molora import config, train
from molora.prepare import __main__ as prepare

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs/presets").rglob("*.yml"))
STAGE1 = ROOT / "configs/presets/reasoning/llama3.2_3b_mixture_lora_sft.yml"
STAGE2 = ROOT / "configs/presets/reasoning/llama3.2_3b_mixture_lora_sft_cot.yml"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: str(path.relative_to(ROOT)))
def test_presets_are_valid(preset: Path) -> None:
    assert not list(config.without_effect(config.resolve(config.load(preset)).training))


def test_the_stage_table() -> None:
    one, two = config.load(STAGE1), config.load(STAGE2)
    for stage in (one, two):
        injection = stage.injection
        shape = (injection.strategy, injection.num_experts, injection.top_k, injection.lora_r, injection.lora_alpha)
        assert shape == ("mixture_lora", 4, 2, 32, 64)
        assert injection.init_b_std == 0
        assert stage.moe.load_balance.type == "aux_loss"
        assert stage.training.step_unit == "micro"
        assert stage.training.grad_accum_steps == 2
    assert (one.injection.lora_dropout, two.injection.lora_dropout) == (0.08, 0.05)
    assert [(phase.step, phase.trainable) for phase in one.training.phases] == [
        (0, ["router"]),
        (1000, ["router", "lora", "attn_lora"]),
    ]
    assert [(phase.step, phase.trainable) for phase in two.training.phases] == [(0, ["router", "lora", "attn_lora"])]
    assert (one.training.lr, two.training.lr) == (6.0e-5, 1.5e-5)
    assert (one.moe.router_z_loss_coef, two.moe.router_z_loss_coef) == (0.0003, 0.0001)
    assert (one.moe.load_balance.aux_loss_coef, two.moe.load_balance.aux_loss_coef) == (0.003, 0.001)
    assert (one.training.max_train_steps, two.training.max_train_steps) == (5000, 3000)
    assert (one.data.max_length, two.data.max_length) == (512, 1024)
    assert (one.training.batch_size, two.training.batch_size) == (10, 8)
    assert (one.model_name, two.model_name) == (
        "meta-llama/Llama-3.2-3B",
        "outputs/reasoning/stage1_general_sft/final",
    )


def test_micro_batches_are_the_tutorials_work() -> None:
    one, two = (config.resolve(config.load(preset)).training for preset in (STAGE1, STAGE2))
    assert [phase.step for phase in one.phases] == [0, 500]
    assert one.max_train_steps * one.batch_size * one.grad_accum_steps == 50_000
    assert two.max_train_steps * two.batch_size * two.grad_accum_steps == 24_000


SPLITS = ("DATA", "BENCH")


def test_the_pipeline_script_prepares_trains_and_benches_both_stages(tmp_path: Path) -> None:
    """With a Python that only writes down how it was called; the training commands must be valid as they are."""
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> {tmp_path}/calls\n')
    recorder.chmod(0o755)
    sets = ("GENERAL", "MATH")
    data = {f"{name}_{split}": str(tmp_path / name / f"{split}.jsonl") for name in sets for split in SPLITS}
    variables = {"PYTHON": str(recorder), "OUTPUT": "out", "STAGE1_STEPS": "40", "TRAIN_ARGS": "--set seed=1"} | data
    script = ROOT / "configs/run_llama32_pipeline_reasoning.sh"
    subprocess.run([str(script)], cwd=ROOT, env=os.environ | variables, check=True)
    calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    each = ["molora.train", "molora.evaluate"]
    assert [call[1] for call in calls] == [*["molora.prepare"] * 2, *each * 2, "molora.verdict"]
    for call, name in zip(calls[:2], sets, strict=True):
        options = prepare.parse(call[2:])
        assert [str(options.out), str(options.bench)] == [data[f"{name}_{split}"] for split in SPLITS]
    trained, benched, judged = calls[2:6:2], calls[3:6:2], calls[6]
    stages = []
    for call in trained:
        options = train.parse(call[2:])
        stages.append(config.resolve(config.load(ROOT / options.preset, options.set)))
    assert [stage.training.max_train_steps for stage in stages] == [20, 1500]
    assert [stage.seed for stage in stages] == [1, 1]
    assert stages[1].model_name == "out/stage1_general_sft/final"
    for call, models in zip(
        benched, (["base", "out/stage1_general_sft/final"], ["out/stage2_reasoning_sft/final"]), strict=True
    ):
        assert [value for flag, value in pairwise(call) if flag == "--model"] == models
        assert len([flag for flag in call if flag == "--bench"]) == 2
    assert judged[2:4] == [call[call.index("--output") + 1] for call in benched]
    named = [judged[judged.index(flag) + 1] for flag in ("--general", "--maths")]
    assert named == [value for flag, value in pairwise(benched[0]) if flag == "--bench"]
