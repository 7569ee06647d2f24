"""Real processes, started by torchrun, on gloo: what they compute together is what one computes alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molora import cli, data, metrics, train
from tests.conftest import make_rows, write_jsonl

ROOT = Path(__file__).parent.parent.parent
SETTINGS = [
    "data.max_length=64",
    "device=cpu",
    "model.load_precision.mode=fp32",
    "injection.lora_r=4",
    "injection.init_b_std=0.05",
    "moe.router_z_loss_coef=0.3",
    "moe.load_balance.aux_loss_coef=0.5",
    "training.phases=[{step: 0, trainable: [router]}, {step: 2, trainable: [router, lora, attn_lora]}]",
    "training.lr=1e-3",
    "training.max_train_steps=4",
    "training.val_size=6",
    "training.save_steps=2",
    "training.log_steps=1",
]
MEASURED = ("loss", "z_loss", "load_balance", "grad_norm", "val_loss")


def arguments(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    preset = output.parent / "preset.yml"
    preset.write_text("seed: 3\n")
    values = [f"model_name={model}", f"data.path={rows}", *SETTINGS, *more]
    return ["--preset", str(preset), "--output-dir", str(output), *(w for value in values for w in ("--set", value))]


def alone(*given: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: train.main(list(given)))
    assert exit_.value.code == 0


def start(processes: int, *given: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "molora.train", *given], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def together(processes: int, *given: str) -> str:
    out, err = (process := start(processes, *given)).communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def numbers(output: Path) -> torch.Tensor:
    lines = metrics.read(output / metrics.FILE)
    return torch.tensor([line[name] for line in lines for name in MEASURED if name in line], dtype=torch.float64)


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()


def distance(one: Path, other: Path) -> tuple[float, float]:
    """Largest differences of what was measured (relative) and of the weights."""
    a, b = numbers(one), numbers(other)
    apart = (weights(one / "final") - weights(other / "final")).abs().max().item()
    return ((a - b) / a).abs().max().item(), apart


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows(40))


@pytest.fixture(scope="module")
def one_process(
    tiny_model_dir: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float, float]:
    """A run of 8 rows a step, and how far apart other orders of the same sums are: the rounding that is allowed."""
    folder = tmp_path_factory.mktemp("alone")
    for batch, accumulated in ((8, 1), (4, 2), (2, 4)):
        split = [f"training.batch_size={batch}", f"training.grad_accum_steps={accumulated}"]
        alone(*arguments(tiny_model_dir, rows, folder / f"{batch}x{accumulated}", *split))
    apart = [distance(folder / "8x1", folder / other) for other in ("4x2", "2x4")]
    return folder / "8x1", 2 * max(a for a, _ in apart), 2 * max(b for _, b in apart)


@pytest.mark.parametrize(
    ("parallel", "more"),
    [
        ("ddp", ["training.batch_size=2", "training.grad_accum_steps=2"]),
        ("fsdp", ["training.batch_size=2", "training.grad_accum_steps=2"]),
        pytest.param(
            "fsdp", ["training.batch_size=4", "model.gradient_checkpointing=non_reentrant"], marks=pytest.mark.slow
        ),
        pytest.param(
            "fsdp", ["training.batch_size=4", "model.gradient_checkpointing=reentrant"], marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_train_what_one_trains(
    parallel: str,
    more: list[str],
    one_process: tuple[Path, float, float],
    tiny_model_dir: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    """Losses, router losses, gradient norms, weights, over a phase change; a checkpoint of two goes on in one."""
    single, measured, moved = one_process
    output = tmp_path / "run"
    given = arguments(tiny_model_dir, rows, output, f"training.parallel={parallel}", *more)
    out = together(2, *given)
    found = distance(single, output)
    assert found[0] <= measured and found[1] <= moved, (found, measured, moved)
    assert out.count("finished:") == out.count("phase from step 2") == 1

    for name in ("final", "checkpoint-4"):
        shutil.rmtree(output / name)
    same = [value for value in more if value.startswith("model.")]
    split = ["training.batch_size=4", "training.grad_accum_steps=2"]
    alone(*arguments(tiny_model_dir, rows, output, *split, *same), "--resume")
    found = distance(single, output)
    assert found[0] <= measured and found[1] <= moved, (found, measured, moved)


def test_a_checkpoint_of_one_process_goes_on_in_two(
    one_process: tuple[Path, float, float], tiny_model_dir: Path, rows: Path, tmp_path: Path
) -> None:
    single, measured, moved = one_process
    output = shutil.copytree(single, tmp_path / "run")
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(output / name)
    more = ["training.parallel=fsdp", "training.batch_size=4"]
    together(2, *arguments(tiny_model_dir, rows, output, *more), "--resume")
    found = distance(single, output)
    assert found[0] <= measured and found[1] <= moved, (found, measured, moved)


def test_no_row_is_seen_twice_and_none_is_left_out() -> None:
    whole = list(data.RunOrder(10, 0, 8, 48))
    for processes in (1, 2, 4):
        parts = [list(data.RunOrder(10, 0, 8, 48, rank, processes)) for rank in range(processes)]
        assert [len(part) for part in parts] == [40 // processes] * processes
        assert [part[i] for i in range(40 // processes) for part in parts] == whole


def test_another_number_of_rows_a_step_is_refused(
    one_process: tuple[Path, float, float],
    tiny_model_dir: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = shutil.copytree(one_process[0], tmp_path / "run")
    shutil.rmtree(output / "final")
    with pytest.raises(SystemExit) as exit_:
        given = arguments(tiny_model_dir, rows, output, "training.batch_size=4")
        cli.run(lambda: train.main([*given, "--resume"]))
    assert exit_.value.code == 2
    assert "a step was of 8 rows" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_checkpoint_to_go_on_from(
    one_process: tuple[Path, float, float], tiny_model_dir: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    given = arguments(tiny_model_dir, rows, output, "training.batch_size=4", "training.max_train_steps=400")
    process = start(2, *given)
    until = time.monotonic() + 120
    while not (output / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    [victim] = [int(pid) for pid, found in environments.items() if b"LOCAL_RANK=1" in found.split(b"\0")]
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"error: (rank 0: another process of this run is gone|stopped, because another process)", err)
    assert "--resume" in err
    assert not (output / "final").exists()
    newest = max(int(path.name.partition("-")[2]) for path in output.glob("checkpoint-[0-9]*"))
    again = start(2, *given, "--resume")
    while (
        not (output / f"checkpoint-{newest + 2}").exists() and again.poll() is None and time.monotonic() < until + 120
    ):
        time.sleep(0.02)
    again.terminate()
    again.communicate(timeout=60)
    assert (output / f"checkpoint-{newest + 2}").exists()


def test_bad_input_is_told_once(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    process = start(2, *arguments(tiny_model_dir, rows, tmp_path / "run", "data.path=none.jsonl"))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("none.jsonl: no such file") == 1
