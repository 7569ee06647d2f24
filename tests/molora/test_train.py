"""The command line: the tutorial's two commands, and every kind of bad input."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molora import cli, config, data, metrics, train
from molora.trainer import Trainer
from tests.conftest import make_rows, write_jsonl

ROOT = Path(__file__).parent.parent.parent
STAGE1 = ROOT / "configs/presets/reasoning/llama3.2_3b_mixture_lora_sft.yml"
STAGE2 = ROOT / "configs/presets/reasoning/llama3.2_3b_mixture_lora_sft_cot.yml"
TINY = [
    "--set", "device=cpu",
    "--set", "model.load_precision.mode=fp32",
    "--set", "training.batch_size=2",
    "--set", "training.log_steps=2",
    "--set", "training.save_steps=0",
]  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tutorial's data files, small; the command lines run in it."""
    (tmp_path / "data/reasoning").mkdir(parents=True)
    write_jsonl(tmp_path / "data/sft_50k_en_ko_raw.jsonl", make_rows(20, seed=1))
    write_jsonl(tmp_path / "data/reasoning/openr1_math_40k.jsonl", make_rows(20, seed=2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    """Exit code of ``python -m molora.train`` with these arguments, in this process."""
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: train.main(list(arguments)))
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def stage1(model: Path, *more: str) -> list[str]:
    return [
        "--preset", str(STAGE1),
        "--set", f"model_name={model}",
        "--set", "data.format=raw", "--set", "data.task=sft",
        "--set", "data.path=data/sft_50k_en_ko_raw.jsonl",
        "--set", "data.max_length=512",
        "--set", "training.max_train_steps=5000",
        "--set", "training.batch_size=10", "--set", "training.grad_accum_steps=2",
        "--output-dir", "outputs/reasoning/stage1_general_sft",
        *TINY, "--set", "training.max_train_steps=6", "--set", "training.phases.1.step=2", *more,
    ]  # fmt: skip


def stage2(*more: str) -> list[str]:
    return [
        "--preset", str(STAGE2),
        "--set", "model_name=outputs/reasoning/stage1_general_sft/final",
        "--set", "data.format=raw", "--set", "data.task=sft",
        "--set", "data.path=data/reasoning/openr1_math_40k.jsonl",
        "--set", "data.max_length=1024",
        "--set", "training.max_train_steps=3000",
        "--set", "training.batch_size=8", "--set", "training.grad_accum_steps=2",
        "--output-dir", "outputs/reasoning/stage2_reasoning_sft",
        *TINY, "--set", "training.max_train_steps=4", *more,
    ]  # fmt: skip


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path("outputs/reasoning") / folder / "final/adapter.safetensors")


def test_the_tutorials_two_commands(workplace: Path, tiny_model_dir: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "molora.train", *stage1(tiny_model_dir, "--metrics-level", "advanced")]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "phase from step 1 | trains: router" in done.stdout
    assert run(*stage2()) == 0

    one, two = weights("stage1_general_sft"), weights("stage2_reasoning_sft")
    assert one.keys() == two.keys()
    assert all(tensor.dtype == torch.float32 for tensor in two.values())
    assert [name for name in one if torch.equal(one[name], two[name])] == []
    manifest = json.loads(Path("outputs/reasoning/stage2_reasoning_sft/final/molora.json").read_text())
    assert manifest["base_model"] == str(tiny_model_dir)
    assert manifest["injection"]["lora_dropout"] == 0.05
    lines = metrics.read(Path("outputs/reasoning/stage1_general_sft/metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3]  # micro-batches, two to a step
    assert len(lines[0]["load"]) == 6


def test_stage_2_without_learning_rate_keeps_stage_1(workplace: Path, tiny_model_dir: Path) -> None:
    assert run(*stage1(tiny_model_dir)) == 0
    assert run(*stage2("--set", "training.lr=0")) == 0
    one, two = weights("stage1_general_sft"), weights("stage2_reasoning_sft")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(name.endswith("router.weight") for name in one)


def test_stage_2_has_its_own_dropout_in_force(workplace: Path, tiny_model_dir: Path) -> None:
    assert run(*stage1(tiny_model_dir)) == 0
    settings = config.resolve(config.load(STAGE2, [value for value in stage2() if "=" in value]))
    trainer = Trainer(settings, workplace / "x", data.read_rows(settings.data.path or ""))
    rates = {module.dropout for module in trainer.model.modules() if hasattr(module, "lora_a")}
    assert rates == {0.05}


def test_a_process_killed_while_training_resumes(workplace: Path, tiny_model_dir: Path) -> None:
    def arguments(output: str) -> list[str]:
        many = ["--set", "training.max_train_steps=24", "--set", "training.save_steps=4", "--output-dir", output]
        return stage1(tiny_model_dir, *many)

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "molora.train", *arguments("killed")],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    waited = time.monotonic() + 60
    while not Path("killed/checkpoint-4").exists() and process.poll() is None and time.monotonic() < waited:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("killed/final").exists()
    assert run(*arguments("killed"), "--resume") == 0
    assert run(*arguments("whole")) == 0
    killed, whole = (load_file(f"{name}/final/adapter.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


def test_validate_only_and_print_config_train_nothing(
    workplace: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*stage1(tiny_model_dir), "--validate-only") == 0
    assert "valid, 20 rows, 3 optimizer steps" in capsys.readouterr().out
    assert run(*stage1(tiny_model_dir), "--print-config") == 0
    printed = workplace / "printed.yml"
    printed.write_text(capsys.readouterr().out)
    assert config.load(printed).training.step_unit == "optimizer"
    assert not (workplace / "outputs").exists()


def snapshot(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_finished_run_is_kept_unless_told_otherwise(
    workplace: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = workplace / "outputs/reasoning/stage1_general_sft"
    assert run(*stage1(tiny_model_dir)) == 0
    (output / "notes.txt").write_text("mine")
    before = snapshot(workplace)
    assert run(*stage1(tiny_model_dir)) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert run(*stage1(tiny_model_dir), "--resume") == 0
    assert "finished already" in capsys.readouterr().out
    assert run(*stage1(tiny_model_dir, "--set", "seed=1"), "--resume") == 2
    assert "was trained with seed=42, now it is 1" in capsys.readouterr().err
    assert run(*stage1(output / "final"), "--overwrite") == 2
    assert run(*stage1(tiny_model_dir), "--overwrite", "--resume") == 2
    assert snapshot(workplace) == before
    assert run(*stage1(tiny_model_dir, "--set", "seed=1"), "--overwrite") == 0
    after = snapshot(workplace)
    assert after.keys() == before.keys()
    changed = {Path(name).name for name in after if after[name] != before[name]}
    assert {"adapter.safetensors", "metrics.jsonl"} <= changed
    assert "notes.txt" not in changed


BAD = {
    "unknown key": (["--set", "training.learning_rate=1"], "unknown key 'training.learning_rate'"),
    "misspelt key": (["--set", "injection.num_expert=4"], "did you mean 'injection.num_experts'?"),
    "wrong type": (["--set", "training.batch_size=many"], "training.batch_size"),
    "NaN lr": (["--set", "training.lr=.nan"], "training.lr: must be a finite number"),
    "negative lr": (["--set", "training.lr=-1"], "training.lr"),
    "top_k": (["--set", "injection.top_k=5"], "top_k=5 is larger than num_experts=4"),
    "phases out of order": (["--set", "training.phases.1.step=0"], "phases are out of order"),
    "unknown group": (["--set", "training.phases.0.trainable=[routr]"], "training.phases.0.trainable.0"),
    "missing preset": (["--preset", "none.yml"], "none.yml: no such file"),
    "missing model": (["--set", "model_name=outputs/a/final"], "outputs/a/final"),
    "a path": (["--set", "model_name=nope/foo/bar", "--validate-only"], "no folder 'nope/foo/bar' here"),
    "folder of a run": (["--set", "model_name=a_run"], "give 'a_run/final'"),
    "attention": (["--set", "model.attn_implementation=flash_attention_2"], "model.attn_implementation=auto"),
    "no model": (["--set", "model_name=null"], "model_name is missing"),
    "not a model": (["--set", "model_name=data"], "'data' cannot be loaded"),
    "other backbone": (["--set", "backbone=qwen3"], "backbone"),
    "no such device": (["--set", "device=tpu9"], "device"),
    "missing data": (["--set", "data.path=none.jsonl"], "none.jsonl: no such file"),
    "no data": (["--set", "data.path=null"], "data.path is missing"),
    "malformed row": (["--set", "data.path=bad.jsonl"], "bad.jsonl:2: not JSON"),
    "empty data": (["--set", "data.path=empty.jsonl"], "empty.jsonl: no rows"),
    "no known columns": (["--set", "data.path=columns.jsonl"], "columns.jsonl:1: no known columns"),
    "all too long": (["--set", "data.max_length=4"], "data.max_length=4"),
    "too much held out": (["--set", "training.val_size=20"], "training.val_size=20"),
    "output is a file": (["--output-dir", "bad.jsonl"], "bad.jsonl"),
    "unmatched target": (["--set", "injection.target_keywords=[gate]"], "'gate' matches no projection"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_changes_nothing(
    case: str, workplace: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (workplace / "empty.jsonl").write_text("\n")
    (workplace / "columns.jsonl").write_text('{"question": "a"}\n')
    for name in ("checkpoint-2", "final"):
        (workplace / "a_run" / name).mkdir(parents=True)
        (workplace / "a_run" / name / "molora.json").write_text("{}")
    before = snapshot(workplace)
    arguments, message = BAD[case]
    assert run(*stage1(tiny_model_dir), *arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert snapshot(workplace) == before


def test_a_full_gpu_names_the_settings_that_help(
    workplace: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(_: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train", fill)
    assert run(*stage1(tiny_model_dir)) == 2
    assert "model.gradient_checkpointing=non_reentrant" in capsys.readouterr().err


def damage(how: str) -> None:
    adapter = Path("outputs/reasoning/stage1_general_sft/final/adapter.safetensors")
    content = adapter.read_bytes()
    adapter.write_bytes(content[:-100] if how == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (None, ["--set", "injection.num_experts=8"], "num_experts is 4 there, 8 here"),
        (None, ["--set", "injection.lora_r=16"], "lora_r is 32 there, 16 here"),
        (lambda: damage("truncated"), [], "adapter.safetensors"),
        (lambda: damage("flipped"), [], "adapter.safetensors"),
        (lambda: Path("outputs/reasoning/stage1_general_sft/final/molora.json").write_text("{"), [], "molora.json"),
    ],
)
def test_a_stage_that_does_not_fit_is_refused(
    spoil: Callable[[], object] | None,
    arguments: list[str],
    message: str,
    workplace: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*stage1(tiny_model_dir, "--set", "training.max_train_steps=2", "--set", "training.phases.1.step=1")) == 0
    if spoil is not None:
        spoil()
    before = snapshot(workplace)
    capsys.readouterr()
    assert run(*stage2(*arguments)) == 2
    assert message in capsys.readouterr().err
    assert snapshot(workplace) == before
