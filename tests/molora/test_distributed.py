"""Real processes, started by torchrun, on gloo: what they compute together is what one computes alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from molora import cli, config, data, distributed, metrics, train
from molora.errors import UserError
from molora_kernels.backend import compiler_installed
from tests.conftest import make_rows, write_jsonl
from tests.molora import distributed_runs

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
PACKED = ["data.packing=true", "moe.load_balance.type=aux_loss_free", "logging.metrics_level=advanced"]
BF16 = ["model.load_precision.mode=bf16"]
DROPOUT = ["injection.lora_dropout=0.2"]
SPLITS = {
    f"{b}x{a}": [f"training.batch_size={b}", f"training.grad_accum_steps={a}"]
    for b, a in ((8, 1), (4, 2), (2, 4), (1, 8))
}
ORDERS = {
    f"{split} {kernels}": [*SPLITS[split], *more]
    for kernels, more in (("", []), ("dense", ["kernels.form=dense"]), ("torch", ["kernels.backend=torch"]))
    for split in SPLITS
}
"""Of the same sums. The largest difference of a weight is that of one whose gradient is nearly nothing, of which Adam
makes as large a step as of any: few orders do not show how large it gets."""
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


LONGEST = 900
"""Seconds that two processes may take. A minute is much; but where others load the machine it may come to several, and
only what hangs is to fail."""


def in_two_processes(program: str, *given: str) -> tuple[int, str, str]:
    """Exit code, output and errors of ``program`` under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *given], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            out, err = process.communicate(timeout=LONGEST)
        finally:
            process.terminate()  # where it hangs, and with it what it started
    return process.returncode, out, err


def run_all(folder: Path, runs: dict[str, tuple[list[str], str | None]]) -> tuple[int, str, str]:
    """The same of ``runs``, one after the other, as tests/molora/distributed_runs.py takes them."""
    (folder / "runs.json").write_text(json.dumps(runs))
    return in_two_processes("tests.molora.distributed_runs", str(folder))


def numbers(output: Path, *names: str) -> torch.Tensor:
    lines = metrics.read(output / metrics.FILE)
    return torch.tensor([line[name] for line in lines for name in names if name in line], dtype=torch.float64)


def loads(output: Path) -> torch.Tensor:
    """Every router's load, of all tokens and of each domain's, in every step; empty where it is not logged."""
    found: list[float] = []
    for line in metrics.read(output / metrics.FILE):
        by_domain = [entry["load"] for _, entry in sorted(line.get("domains", {}).items())]
        found += [share for load in (line.get("load", {}), *by_domain) for shares in load.values() for share in shares]
    return torch.tensor([0.0, *found], dtype=torch.float64)


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()


def distance(one: Path, other: Path) -> torch.Tensor:
    """Largest differences of what was measured (relative), of loads, and of the weights."""
    a, b = numbers(one, *MEASURED), numbers(other, *MEASURED)
    apart = weights(one / "final") - weights(other / "final")
    return torch.stack([((a - b) / a).abs().max(), (loads(one) - loads(other)).abs().max(), apart.abs().max()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Path:
    named = [row | {"domain": "ab"[i % 3 == 0]} for i, row in enumerate(make_rows(40))]
    return write_jsonl(folder / "rows.jsonl", named)


@pytest.fixture(scope="module")
def one_process(tiny_model_dir: Path, rows: Path, folder: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """Runs of 8 rows a step, and how far apart other orders of the same sums are: the rounding that is allowed."""
    runs = {}
    for name, more in (("plain", []), ("packed", PACKED)):
        for order, settings in ORDERS.items():
            alone(*arguments(tiny_model_dir, rows, folder / f"{name} {order}".strip(), *settings, *more))
        first, *others = [folder / f"{name} {order}".strip() for order in ORDERS]
        runs[name] = first, 2 * torch.stack([distance(first, other) for other in others]).amax(0)
    alone(*arguments(tiny_model_dir, rows, folder / "bf16 8x1", *SPLITS["8x1"], *BF16))
    return runs


TWO = ["training.batch_size=2", "training.grad_accum_steps=2"]
FOUR = ["training.batch_size=4"]
FSDP = "training.parallel=fsdp"
RUNS = {
    "plain ddp": [*TWO],
    "plain fsdp": [FSDP, *TWO],
    "plain fsdp, layers recomputed": [FSDP, *FOUR, "model.gradient_checkpointing=non_reentrant"],
    "plain fsdp, layers recomputed, reentrant": [FSDP, *FOUR, "model.gradient_checkpointing=reentrant"],
    "plain fsdp, goes on from one process": [FSDP, *FOUR],
    "plain ddp, compiled": [*TWO, "model.compile=true"],
    "plain fsdp, compiled": [FSDP, *FOUR, "model.compile=true"],
    "plain ddp, uncached": [*FOUR, "data.cache=false"],
    "packed ddp": [*TWO, *PACKED],
    "packed fsdp": [FSDP, *TWO, *PACKED],
    "bf16 ddp": [*TWO, *BF16],
    "bf16 fsdp": [FSDP, *TWO, *BF16],
    "dropout ddp": [*TWO, *DROPOUT],
    "dropout ddp, again": [*TWO, *DROPOUT],
    "dropout ddp, goes on": [*TWO, *DROPOUT],
    "dropout fsdp": [FSDP, *TWO, *DROPOUT],
    "dropout fsdp, goes on": [FSDP, *TWO, *DROPOUT],
    "spoilt ddp": [*TWO, *PACKED, "training.save_steps=1"],
    "spoilt fsdp": [FSDP, *TWO, *PACKED, "training.save_steps=1"],
}


@pytest.fixture(scope="module")
def two_processes(
    one_process: dict[str, tuple[Path, torch.Tensor]], tiny_model_dir: Path, rows: Path, folder: Path
) -> Path:
    """The folder of all RUNS, done by two processes."""
    sources = {"plain fsdp, goes on from one process": folder / "plain 8x1"}
    sources |= {f"{name}, goes on": folder / name for name in ("dropout ddp", "dropout fsdp")}
    runs = {}
    for name, more in RUNS.items():
        source = sources.get(name)
        given = arguments(tiny_model_dir, rows, folder / name, *more)
        runs[name] = ([*given, "--resume"], str(source)) if source else (given, None)
    code, out, err = run_all(folder, runs)
    assert code == 0, err
    assert out.count("finished:") == len(RUNS)
    assert out.count("phase from step 2") == len(RUNS)
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith(("plain", "packed"))])
def test_two_processes_train_what_one_trains(
    name: str, one_process: dict[str, tuple[Path, torch.Tensor]], two_processes: Path
) -> None:
    """Losses, router losses, gradient norms, loads, weights, selection biases, over a phase change."""
    single, allowed = one_process[name.partition(" ")[0]]
    found = distance(single, two_processes / name)
    assert (found <= allowed).all(), (found, allowed)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_in_bf16_are_as_exact_as_one(
    parallel: str, one_process: dict[str, tuple[Path, torch.Tensor]], two_processes: Path
) -> None:
    exact, _ = one_process["plain"]
    error = distance(exact, two_processes / "bf16 8x1")
    found = distance(exact, two_processes / f"bf16 {parallel}")
    assert (found <= 2 * error).all(), (found, error)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(
    parallel: str,
    one_process: dict[str, tuple[Path, torch.Tensor]],
    two_processes: Path,
    tiny_model_dir: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    single, allowed = one_process["plain"]
    output = distributed_runs.cut(two_processes / f"plain {parallel}", tmp_path / "run")
    alone(*arguments(tiny_model_dir, rows, output, f"training.parallel={parallel}", *SPLITS["4x2"]), "--resume")
    found = distance(single, output)
    assert (found <= allowed).all(), (found, allowed)


def seeds(two_processes: Path, name: str) -> list[dict[int, set[int]]]:
    """The dropout seeds of each process, step by step."""
    found = [json.loads((two_processes / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
    return [{int(step): set(drawn) for step, drawn in of_one.items()} for of_one in found]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_process_has_its_own_dropout_and_a_run_goes_on_bit_for_bit(parallel: str, two_processes: Path) -> None:
    drawn = [of_step for of_one in seeds(two_processes, f"dropout {parallel}") for of_step in of_one.values()]
    assert len(drawn) == 2 * 4 and all(drawn)
    assert sum(map(len, drawn)) == len(set().union(*drawn)), "a mask came twice"
    whole = two_processes / f"dropout {parallel}"
    for other in ("again", "goes on"):
        if (output := two_processes / f"dropout {parallel}, {other}").exists():
            assert not distance(whole, output).any(), other
    assert distance(two_processes / f"plain {parallel}", whole).any()


def test_a_run_that_goes_on_in_another_number_of_processes_repeats_no_dropout(
    two_processes: Path, tiny_model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = distributed_runs.cut(two_processes / "dropout ddp", tmp_path / "run")
    drawn = distributed_runs.note_seeds(monkeypatch)
    alone(*arguments(tiny_model_dir, rows, output, *SPLITS["4x2"], *DROPOUT), "--resume")
    assert drawn.keys() == {2, 3} and all(drawn.values())
    before = [of_one[step] for of_one in seeds(two_processes, "dropout ddp") for step in (0, 1)]
    assert not set().union(*before) & set().union(*drawn.values())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_in_one_process_skips_the_step_in_all(parallel: str, two_processes: Path) -> None:
    output = two_processes / f"spoilt {parallel}"
    steps = [weights(output / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert [torch.equal(one, next_one) for one, next_one in pairwise(steps)] == [True, False, False]
    assert all(step.isfinite().all() for step in steps)
    lines = metrics.read(output / metrics.FILE)
    assert [line["skipped"] for line in lines if "skipped" in line] == [0, 1, 1, 1]
    [told] = [line for line in lines if "warning" in line]
    assert told["step"] == 2
    assert re.search(
        r"gradient of model.* is not finite; rows .*rows.jsonl:\d+, .*; the step is skipped", told["warning"]
    )


def test_what_is_gathered_lies_in_the_first_process_alone() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        spread = distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (1,)), [Shard(0)])
        tree = {"moments": [spread], "step": 3}
        first, other = (distributed.whole(tree, distributed.World(rank=rank, size=2)) for rank in (0, 1))
        assert torch.equal(first["moments"][0], torch.arange(6.0))
        assert (other["moments"][0].numel(), other["step"]) == (0, 3)
    finally:
        dist.destroy_process_group()


def test_no_row_is_seen_twice_and_none_is_left_out() -> None:
    whole = list(data.RunOrder(10, 0, 8, 48))
    for processes in (1, 2, 4):
        parts = [list(data.RunOrder(10, 0, 8, 48, rank, processes)) for rank in range(processes)]
        assert [len(part) for part in parts] == [40 // processes] * processes
        assert [part[i] for i in range(40 // processes) for part in parts] == whole
        epochs: dict[int, list[int]] = {epoch: [] for epoch in range(5)}
        for rank, part in enumerate(parts):
            for i, row in enumerate(part):
                epochs[(8 + i * processes + rank) // 10].append(row)
        assert [sorted(epochs[epoch]) for epoch in (1, 2, 3)] == 3 * [list(range(10))]  # those that are whole


def test_another_number_of_rows_a_step_is_refused(
    one_process: dict[str, tuple[Path, torch.Tensor]],
    tiny_model_dir: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = distributed_runs.cut(one_process["plain"][0], tmp_path / "run")
    with pytest.raises(SystemExit) as exit_:
        given = arguments(tiny_model_dir, rows, output, "training.batch_size=4")
        cli.run(lambda: train.main([*given, "--resume"]))
    assert exit_.value.code == 2
    assert "a step was of 8 rows" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["final", "checkpoint-2"])
def test_an_output_folder_that_not_all_machines_see(
    name: str, tiny_model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process found a run there, finished or not; this one, on another machine, has nothing."""
    output = tmp_path / "run"
    found = iter([True] if name == "final" else [False, output / name])
    monkeypatch.setattr(distributed.World, "from_first", lambda *_: next(found))
    monkeypatch.setattr(distributed.World, "gather", lambda world, value: [value])
    monkeypatch.setattr(distributed, "_not_to_be_stopped", lambda: None)
    options = train.parse([*arguments(tiny_model_dir, rows, output), "--resume"])
    with pytest.raises(UserError, match=f"{name}: this process does not see it; give an --output-dir that all"):
        train.run(config.load(options.preset, options.set), options, distributed.World(size=2))


@pytest.mark.parametrize(("rank", "parallel"), [(0, "ddp"), (1, "fsdp")])
def test_a_killed_process_ends_the_run_with_a_checkpoint_to_go_on_from(
    rank: int, parallel: str, two_processes: Path, tiny_model_dir: Path, rows: Path, tmp_path: Path
) -> None:
    given = arguments(tiny_model_dir, rows, output := tmp_path / "run", *RUNS[f"plain {parallel}"])
    code, _, err = run_all(tmp_path, {f"rank {rank} killed": (given, None)})
    assert code != 0
    left = "rank 1: " if rank == 0 else "(rank 0: )?"
    assert re.search(f"error: {left}(another process of this run is gone|stopped, because another process)", err), err
    assert "--resume" in err
    assert not (output / "final").exists()
    code, out, err = run_all(tmp_path, {"goes on": ([*given, "--resume"], None)})
    assert code == 0, err
    assert "goes on from checkpoint-2" in out
    assert not distance(two_processes / f"plain {parallel}", output).any()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([FSDP, "model.load_precision.mode=int4"], "fsdp spreads bases of 16 or 32 bits only"),
        (["data.max_length=3"], "within data.max_length=3"),  # found by the first, while the others wait for its tokens
        (["injection.target_keywords=[gate]"], "'gate' matches no projection"),  # with the model
    ],
)
def test_bad_input_is_told_once(
    settings: list[str], told: str, tiny_model_dir: Path, rows: Path, tmp_path: Path
) -> None:
    given = arguments(tiny_model_dir, rows, tmp_path / "run", *settings)
    code, _, err = in_two_processes("molora.train", *given)
    assert code != 0
    assert err.count(told) == err.count("error: ") == 1, err


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start the processes with torchrun"), distributed.joined():
        pass


@pytest.mark.skipif(not compiler_installed(), reason="there is no C++ compiler here")
def test_a_process_without_the_others_compiler_is_refused(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    given = arguments(tiny_model_dir, rows, tmp_path / "run")
    code, _, err = run_all(tmp_path, {"rank 1 without compiler": (given, None)})
    assert code != 0
    told = "error: the processes differ in kernels.backend: inductor on rank 0, torch on rank 1; give all the same"
    assert err.count(told) == 1, err
    assert "CXX" in err and "kernels.backend=torch" in err
    assert not (tmp_path / "run").exists()


def test_a_process_with_another_base_is_refused(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    given = arguments(tiny_model_dir, rows, tmp_path / "run")
    code, _, err = run_all(tmp_path, {"rank 1 with another base": (given, None)})
    assert code != 0
    assert err.count("error: the processes differ in base model: ") == 1, err
    assert "give all the same files of model_name" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["inductor", "inductor", "torch"], "differ in kernels: inductor on rank 0, torch on rank 2; use one"),
        ([{"AMX": True, "a": {"b": 1}}, {"AMX": True, "a": {"b": 2}}], "kernels.a.b: 1 on rank 0, 2 on rank 1"),
        ([{"a": 1}, {"a": 1, "TRITON_INTERPRET": "1"}], "kernels.TRITON_INTERPRET: nothing on rank 0, 1 on rank 1"),
        ([{}, {"a": None}], "kernels.a: nothing on rank 0, None on rank 1"),
        ([{"a": {"b": 1}}, {"a": None}], r"kernels.a: \{'b': 1\} on rank 0, None on rank 1"),
    ],
)
def test_what_must_be_the_same_in_all_processes(values: list[Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.World, "gather", lambda world, value: values)
    with pytest.raises(UserError, match=told):
        distributed.World().require_same("kernels", values[0], "use one")
    with pytest.raises(SystemExit):
        distributed.World(rank=1).require_same("kernels", values[1], "use one")
    del values[1:]
    distributed.World().require_same("kernels", values[0], "use one")


def test_a_process_that_torchrun_stops_still_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so as soon as another has ended."""

    def gather(world: distributed.World, value: Any) -> list[Any]:
        if value is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return [value, "other"]

    monkeypatch.setattr(distributed.World, "gather", gather)
    before = signal.signal(signal.SIGTERM, distributed._stopped)
    try:
        with pytest.raises(UserError, match="differ in data"):
            distributed.World(size=2).require_same("data", "one", "use one")
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["device=cuda:1"], "device: cuda:1 is one device, and here are 2 processes"),
        ([FSDP, "model.load_precision.mode=int4"], "fsdp spreads bases of 16 or 32 bits only"),
        ([FSDP, "model.load_precision.mode=int8"], "fsdp spreads bases of 16 or 32 bits only"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    given: list[str], told: str, tiny_model_dir: Path, rows: Path, tmp_path: Path
) -> None:
    settings = config.load(None, [f"model_name={tiny_model_dir}", f"data.path={rows}", *given])
    with pytest.raises(UserError, match=told):
        train.check_inputs(settings, tmp_path / "run", processes=2)
    if settings.device == "auto":
        train.check_inputs(settings, tmp_path / "run")  # one process can


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the only one that torchrun started, until the test is over."""
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in (given | {"TORCHELASTIC_RUN_ID": "1"}).items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


NCCL = """NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO), NCCL version 2.27.5
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 2 'out of memory'
Exception raised from getNCCLComm at NCCLUtils.cpp:94 (most recent call first):
frame #0: c10::Error"""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            dist.DistBackendError(NCCL),
            r"communication between .* failed \(NCCL error .* Last error: Cuda failure 2 'out of memory'\)",
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1"),
            r"another process of this run is gone \(.*Connection closed by peer \[127\.0\.0\.1\]:1\)",
        ),
    ],
)
@pytest.mark.usefixtures("under_torchrun")
def test_what_broke_between_the_processes_is_told(error: Exception, told: str) -> None:
    with pytest.raises(UserError, match=f"^rank 0: {told}; the checkpoints are whole"), distributed.joined():
        raise error


@pytest.mark.usefixtures("under_torchrun")
def test_a_process_that_is_stopped_does_not_take_it_for_a_failure_of_what_it_does() -> None:
    """As inductor does with any Exception while it compiles."""
    with pytest.raises(UserError, match=r"^stopped, because another process"), distributed.joined():
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it goes on")
