from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import molora
from molora import checkpoint, config, data, metrics, optim
from molora.errors import UserError
from molora.trainer import Trainer
from tests.conftest import make_rows, write_jsonl

MakeConfig = Callable[..., config.Config]
TIMES = {"tokens_per_second", "seconds_per_step", "data_wait_share"}


@pytest.fixture
def make_config(tiny_model_dir: Path, rows_file: Path) -> MakeConfig:
    """A run of 7 steps with everything that could go wrong on resuming: two phases, dropout, accumulation, epochs."""

    def make(*overrides: str) -> config.Config:
        defaults = [
            f"model_name={tiny_model_dir}",
            f"data.path={rows_file}",
            "data.max_length=64",
            "device=cpu",
            "model.load_precision.mode=fp32",
            "injection.lora_r=4",
            "injection.lora_dropout=0.1",
            "training.phases=[{step: 0, trainable: [router]}, {step: 3, trainable: [router, lora, attn_lora]}]",
            "training.lr=1e-2",
            "training.max_train_steps=7",
            "training.batch_size=4",
            "training.grad_accum_steps=2",
            "training.val_size=6",
            "training.val_steps=3",
            "training.save_steps=2",
            "training.log_steps=1",
        ]
        return config.resolve(config.load(None, [*defaults, *overrides]))

    return make


def run(settings: config.Config, output: Path, *, resume: bool = False) -> Trainer:
    trainer = Trainer(settings, output, data.read_rows(settings.data.path or ""), resume=resume)
    trainer.train()
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def numbers(output: Path) -> list[dict[str, Any]]:
    lines = metrics.read(output / metrics.FILE)
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    for folder in ("final", "checkpoint-best"):
        expected, found = weights(one / folder), weights(other / folder)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def crash(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Train until the run dies: before the update of a step, or in the middle of saving one."""

    class Killed(BaseException):
        pass

    kind, _, step = where.partition(" ")
    dies = int(step)

    def update(losses: torch.Tensor) -> optim.Update:
        if trainer.progress.step == dies:
            raise Killed
        return alive_update(losses)

    def save(state: dict[str, Any], path: Path) -> None:
        alive_save(state, path)
        if trainer.progress.step == dies:
            raise Killed

    alive_update, alive_save = trainer._update, torch.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if kind == "update":
            patch.setattr(trainer, "_update", update)
        else:
            patch.setattr(torch, "save", save)
        trainer.train()


@pytest.mark.parametrize("where", ["update 1", "update 3", "update 6", "save 2", "save 6", "update 5, packed"])
def test_a_killed_run_resumes_bit_for_bit(
    where: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, packed, _ = where.partition(", packed")
    settings = make_config("data.packing=true", "data.max_length=96") if packed else make_config()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(settings, whole)
    crash(Trainer(settings, killed, data.read_rows(settings.data.path or "")), monkeypatch, where)
    assert not checkpoint.finished(killed)
    torch.manual_seed(999)  # what the process did before must not matter
    run(settings, killed, resume=True)
    assert_same_run(whole, killed)
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_a_run_killed_before_its_last_folder_only_writes_that(make_config: MakeConfig, tmp_path: Path) -> None:
    settings, whole, killed = make_config(), tmp_path / "whole", tmp_path / "killed"
    run(settings, whole)
    shutil.copytree(whole, killed)
    (killed / "final").rename(killed / ".final.tmp")
    (killed / "checkpoint-best").rename(killed / ".checkpoint-best.old")
    run(settings, killed, resume=True)
    assert_same_run(whole, killed)
    assert list(killed.glob(".*")) == []


def test_a_damaged_checkpoint_is_passed_over(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_config()
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    run(settings, whole)
    shutil.copytree(whole, damaged)
    shutil.rmtree(damaged / "final")
    state = damaged / "checkpoint-7" / "training_state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    (damaged / "checkpoint-6" / "adapter.safetensors").unlink()
    run(settings, damaged, resume=True)
    assert "checkpoint-7 is damaged (checksum of training_state.pt)" in caplog.text
    assert "checkpoint-6 is damaged (adapter.safetensors is missing)" in caplog.text
    assert_same_run(whole, damaged)


def test_what_is_refused_late_leaves_the_earlier_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config("training.max_train_steps=2"), tmp_path / "run")
    before = sorted(tmp_path.joinpath("run").rglob("*"))
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda: (_ for _ in ()).throw(wandb.errors.UsageError("no key")))
    with pytest.raises(UserError, match=r"no key.*wandb login"):
        run(make_config("logging.wandb=true"), tmp_path / "run")
    encode = data.encode_rows

    def foreign(*given: Any, **settings: Any) -> data.Examples:
        examples = encode(*given, **settings)
        examples.rows[-1].input_ids[-1] = 320
        return examples

    monkeypatch.setattr(data, "encode_rows", foreign)
    with pytest.raises(UserError, match=r"gives the token 320, and the model .* has embeddings for 320"):
        run(make_config(), tmp_path / "run")
    assert sorted(tmp_path.joinpath("run").rglob("*")) == before


def test_resuming_with_other_settings_or_data_is_refused(
    make_config: MakeConfig, tmp_path: Path, rows_file: Path
) -> None:
    run(make_config("training.max_train_steps=2"), tmp_path / "run")
    with pytest.raises(UserError, match=r"training\.lr=0\.01, now it is 0\.02"):
        run(make_config("training.max_train_steps=2", "training.lr=2e-2"), tmp_path / "run", resume=True)
    write_jsonl(rows_file, make_rows(48, seed=5))
    with pytest.raises(UserError, match="data files have changed"):
        run(make_config("training.max_train_steps=2"), tmp_path / "run", resume=True)


def gradients(settings: config.Config, output: Path) -> tuple[metrics.Measured, dict[str, torch.Tensor]]:
    """What the first step measured, and the gradient it would have applied."""
    trainer = Trainer(settings, output, data.read_rows(settings.data.path or ""))
    trainer.model.train()
    trainer.enter_phase()
    measured = trainer.train_step(next(iter(trainer.windows())))
    return measured, {name: p.grad for name, p in trainer.open if p.grad is not None}


ALL_OPEN = (
    "training.phases=[{step: 0, trainable: [router, lora, attn_lora]}]",
    "injection.lora_dropout=0",
    "injection.init_b_std=0.05",
    "moe.router_z_loss_coef=0.3",
    "moe.load_balance.aux_loss_coef=0.5",
    "training.max_grad_norm=0",  # the gradient is compared, so it is not clipped
)


@pytest.mark.parametrize(
    ("rows", "micro_batches", "checkpointing"),
    [
        (8, 4, "none"),
        (9, 3, "none"),
        (8, 1, "non_reentrant"),
        (8, 2, "non_reentrant"),
        (8, 1, "reentrant"),
        (8, 2, "reentrant"),
    ],
)
def test_accumulation_and_checkpointing_give_the_gradient_of_one_large_batch(
    rows: int, micro_batches: int, checkpointing: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    def split(count: int) -> tuple[str, str]:
        return f"training.batch_size={rows // count}", f"training.grad_accum_steps={count}"

    expected, expected_gradient = gradients(make_config(*ALL_OPEN, *split(1)), tmp_path / "large")
    kind = f"model.gradient_checkpointing={checkpointing}"
    found, gradient = gradients(make_config(*ALL_OPEN, *split(micro_batches), kind), tmp_path / "small")
    assert gradient.keys() == expected_gradient.keys()
    for name, exact in expected_gradient.items():
        torch.testing.assert_close(gradient[name], exact, rtol=1e-4, atol=1e-6)
    for name in ("loss", "z_loss", "load_balance", "grad_norm", "load"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
    assert found.tokens == expected.tokens


def test_micro_batch_scope_is_token_weighted_too(make_config: MakeConfig, tmp_path: Path) -> None:
    """The z-loss is a mean over tokens, so counting the load per micro-batch must not change its gradient."""
    settings = (*ALL_OPEN, "moe.load_balance.type=none")
    _, expected = gradients(make_config(*settings), tmp_path / "step")
    _, found = gradients(make_config(*settings, "moe.load_balance.scope=micro_batch"), tmp_path / "micro")
    for name, exact in expected.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-4, atol=1e-6)


def test_phases_open_parameters_with_fresh_state(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(make_config(), tmp_path / "run")
    groups = molora.parameter_groups(trainer.model)
    counted = {
        group: {int(trainer.optimizer.state[parameter]["step"]) for _, parameter in members}
        for group, members in groups.items()
    }
    assert counted == {"router": {7}, "lora": {4}, "attn_lora": {4}}
    before = weights(tmp_path / "run" / "checkpoint-2")
    assert all(not tensor.any() for name, tensor in before.items() if name.endswith("lora_b"))
    after = weights(tmp_path / "run" / "final")
    assert [name for name in after if torch.equal(after[name], before[name])] == []
    shown = capsys.readouterr().out
    assert "phase from step 0 | trains: router 12 tensors 2,072 elements | frozen: lora 12 tensors" in shown
    assert "phase from step 3 | trains: router 12 tensors 2,072 elements, lora 12 tensors" in shown


def test_dense_lora_and_workers_train_too(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = make_config(
        "injection.strategy=dense_lora",
        "training.phases=[{step: 0, trainable: [router, lora, attn_lora]}]",
        "training.num_workers=1",
        "logging.metrics_level=advanced",
    )
    run(settings, tmp_path / "run")
    lines = metrics.read(tmp_path / "run" / metrics.FILE)
    assert lines[0]["load"] == {}
    assert lines[-1]["val_loss"] < lines[0]["loss"]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_advanced_metrics_split_the_load_by_domain_and_change_nothing(
    packing: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    rows = [row | {"domain": "ab"[i % 3 == 0]} for i, row in enumerate(make_rows(24))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    fixed = (f"data.path={path}", f"data.packing={packing}", "training.max_train_steps=2", "training.val_size=0")
    run(make_config(*fixed), tmp_path / "minimal")
    trainer = run(make_config(*fixed, "logging.metrics_level=advanced"), tmp_path / "advanced")
    after = weights(tmp_path / "advanced" / "final")
    for name, tensor in weights(tmp_path / "minimal" / "final").items():
        assert torch.equal(after[name], tensor), name
    windows = list(Trainer(trainer.config, tmp_path / "order", rows).windows(2))
    for line, window in zip(metrics.read(tmp_path / "advanced" / metrics.FILE), windows, strict=True):
        spans = [span for batch in window for of_row in batch.spans for span in of_row]
        seen = {domain: sum(n for d, n in spans if d == domain) for domain in "ab"}
        assert {domain: entry["tokens"] for domain, entry in line["domains"].items()} == seen
        for router, load in line["load"].items():
            shares = [entry["load"][router] for entry in line["domains"].values()]
            mixed = torch.tensor(list(seen.values())).float() @ torch.tensor(shares) / sum(seen.values())
            assert mixed.tolist() == pytest.approx(load, abs=2e-4)  # each is rounded to 4 digits


def test_a_resumed_run_has_one_curve_in_tensorboard(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = make_config("logging.tensorboard=true")
    crash(Trainer(settings, tmp_path, data.read_rows(settings.data.path or "")), monkeypatch, "update 5")
    run(settings, tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "lr", "val_loss"):
        lines = [line for line in metrics.read(tmp_path / metrics.FILE) if name in line]
        curve = events.Scalars(name)
        assert [event.step for event in curve] == [line["step"] for line in lines]
        assert [event.value for event in curve] == pytest.approx([line[name] for line in lines], rel=1e-6)  # fp32 there


def test_aux_loss_free_balancing_moves_the_selection_bias(make_config: MakeConfig, tmp_path: Path) -> None:
    run(make_config("moe.load_balance.type=aux_loss_free"), tmp_path / "run")
    biases = [tensor for name, tensor in weights(tmp_path / "run" / "final").items() if "selection_bias" in name]
    assert biases
    assert all(bias.any() for bias in biases)


def test_the_selection_bias_rests_while_the_router_is_frozen(make_config: MakeConfig, tmp_path: Path) -> None:
    phases = "[{step: 0, trainable: [lora]}, {step: 3, trainable: [router, lora]}, {step: 5, trainable: [attn_lora]}]"
    settings = make_config("moe.load_balance.type=aux_loss_free", f"training.phases={phases}", "training.save_steps=1")
    run(settings, tmp_path / "run")
    moved = []
    for step in range(1, 8):
        tensors = weights(tmp_path / "run" / f"checkpoint-{step}")
        moved.append(sum(t.abs().sum().item() for name, t in tensors.items() if "selection_bias" in name))
    assert moved[:3] == [0, 0, 0]
    assert 0 < moved[3] != moved[4]
    assert moved[4:] == [moved[4]] * 3


def test_what_a_run_leaves(make_config: MakeConfig, tmp_path: Path, tiny_model_dir: Path) -> None:
    output = tmp_path / "run"
    settings = make_config("training.save_total_limit=2", "logging.metrics_level=advanced", "seed=7")
    trainer = run(settings, output)
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoint-6",
        "checkpoint-7",
        "checkpoint-best",
        "config.yml",
        "final",
        "metrics.jsonl",
        "provenance.json",
    ]
    assert config.resolve(config.load(output / "final" / "config.yml")) == settings
    origin = json.loads((output / "final" / "provenance.json").read_text())
    assert origin["seed"] == 7
    assert list(origin["data"]) == [settings.data.path]
    lines = metrics.read(output / metrics.FILE)
    assert {line["seed"] for line in lines if "loss" in line} == {7}
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert trainer.progress.best_loss == min(losses)
    assert trainer.progress.rows == 7 * 8
    load = next(line["load"] for line in lines if "load" in line)
    assert next(iter(load)) == "model.layers.0.mlp.gate_proj"
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in load.values())
    model, tokenizer = molora.load(output / "final")
    assert tokenizer.chat_template == trainer.tokenizer.chat_template
    assert not model.training


@pytest.mark.parametrize("full", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_full_disk_stops_the_run_and_keeps_older_checkpoints(
    full: Exception, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, output = make_config(), tmp_path / "run"
    alive = torch.save

    def save(state: dict[str, Any], path: Path) -> None:
        if "checkpoint-4" in str(path):
            path.write_bytes(b"half")
            raise full
        alive(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match="checkpoint-4: cannot be saved"):
        run(settings, output)
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []
    assert checkpoint.newest(output) == output / "checkpoint-2"


def test_rows_held_out_may_all_be_cut(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = make_rows(8)
    for row in data.hold_out(rows, 2, seed=42)[1]:
        row["response"] = "six " * 99
    settings = make_config(f"data.path={write_jsonl(tmp_path / 'cut.jsonl', rows)}", "training.val_size=2")
    held_out = Trainer(settings, tmp_path / "run", data.read_rows(settings.data.path or "")).held_out
    assert held_out is not None and held_out.truncated == len(held_out) == 2


def test_weights_that_are_not_finite_are_never_saved(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = make_config("training.log_steps=100")
    trainer = Trainer(settings, tmp_path / "run", data.read_rows(settings.data.path or ""))
    name, router = molora.parameter_groups(trainer.model)["router"][0]
    router.data.fill_(float("nan"))
    with pytest.raises(UserError, match=f"{name} is not finite at step 2: checkpoint-2 is not written"):
        trainer.train()
    assert list((tmp_path / "run").glob("checkpoint-*")) == []


def test_the_log_says_how_long_the_loop_waited_for_data(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_config("training.max_train_steps=4", "training.val_steps=0", "training.save_steps=0")
    trainer = Trainer(settings, tmp_path / "run", data.read_rows(settings.data.path or ""))
    clock, made, step = [0.0], trainer.windows(), trainer.train_step

    def windows() -> Iterator[list[data.Batch]]:
        for window in made:
            clock[0] += 1.0
            yield window

    def train_step(window: list[data.Batch]) -> metrics.Measured:
        clock[0] += 3.0
        return step(window)

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer, "windows", windows)
    monkeypatch.setattr(trainer, "train_step", train_step)
    trainer.train()
    lines = [line for line in metrics.read(tmp_path / "run" / metrics.FILE) if "data_wait_share" in line]
    assert [(line["data_wait_share"], line["seconds_per_step"]) for line in lines] == [(0.25, 4.0)] * 4


class Reads(TorchDispatchMode):
    """Notes when the host looks at a value: by an operator whose result or shape depends on it, or by a method that
    copies it. On a GPU each would wait for all that was asked of the device before."""

    LOOK = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
    OPERATORS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: Callable[[], int]) -> None:
        super().__init__()
        self.now, self.seen = now, list[tuple[int, str]]()
        for name in self.LOOK:
            monkeypatch.setattr(torch.Tensor, name, self._noted(name, getattr(torch.Tensor, name)))

    def _noted(self, name: str, alive: Callable[..., Any]) -> Callable[..., Any]:
        def look(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
            self.seen.append((self.now(), name))
            return alive(tensor, *given, **named)

        return look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indexed_by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.OPERATORS or indexed_by_mask:
            self.seen.append((self.now(), name))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        ["moe.load_balance.type=aux_loss_free"],
        ["data.packing=true", "moe.load_balance.scope=micro_batch"],
        ["model.gradient_checkpointing=non_reentrant"],
        ["model.gradient_checkpointing=reentrant"],
    ],
)
def test_no_step_waits_for_the_device_between_readings(
    settings: list[str], make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = ["training.log_steps=4", "training.max_train_steps=8", "training.val_steps=0", "training.save_steps=0"]
    phases = "training.phases=[{step: 0, trainable: [router]}, {step: 4, trainable: [router, lora, attn_lora]}]"
    made = make_config(*quiet, phases, *settings)
    trainer = Trainer(made, tmp_path / "run", data.read_rows(made.data.path or ""))
    assert trainer.tells_at_once
    trainer.tells_at_once = False  # as on a GPU
    # The batches are made on the CPU, in a worker process where there are some; the trainer's own work is watched.
    made_before = list(trainer.windows())
    monkeypatch.setattr(trainer, "windows", lambda: iter(made_before))
    with Reads(monkeypatch, lambda: trainer.progress.step) as reads:
        trainer.train()
    assert {step for step, _ in reads.seen} == {0, 4, 8}, reads.seen  # the phases' beginnings, the readings


def poison(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of the second micro-batch NaN in these steps (counted from 0)."""
    alive = trainer._forward
    calls: list[int] = []

    def forward(batch: data.Batch, label_tokens: int) -> Any:
        record, loss = alive(batch, label_tokens)
        calls.append(trainer.progress.step)
        bad = trainer.progress.step in steps and calls.count(trainer.progress.step) == 2
        return record, loss * float("nan") if bad else loss

    monkeypatch.setattr(trainer, "_forward", forward)


def adapter_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    groups = molora.parameter_groups(trainer.model).values()
    return {name: p.detach().clone() for members in groups for name, p in members}


def test_a_step_that_is_not_finite_changes_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_config(*ALL_OPEN, "moe.load_balance.type=aux_loss_free", "training.weight_decay=0.1")
    trainer = Trainer(settings, tmp_path / "run", data.read_rows(settings.data.path or ""))
    poison(trainer, monkeypatch, {1})
    windows = trainer.windows()
    trainer.enter_phase()
    assert not trainer.train_step(next(windows)).skipped

    def state() -> tuple[Any, ...]:
        moments = [t.clone() for s in trainer.optimizer.state.values() for t in s.values()]
        biases = [b.clone() for name, b in trainer.model.named_buffers() if "selection_bias" in name]
        return *adapter_tensors(trainer).values(), *moments, *biases

    before = state()
    measured = trainer.train_step(next(windows))
    assert measured.skipped
    assert [bool(loss.isnan()) for loss in measured.batch_losses] == [False, True]
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    assert not trainer.train_step(next(windows)).skipped
    changed = [torch.equal(one, other) for one, other in zip(before, state(), strict=True)]
    assert not any(changed)


def test_skipped_steps_are_counted_told_and_in_the_end_stop_the_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_file: Path
) -> None:
    settings = make_config("training.max_skipped_steps=2", "training.save_steps=3", "training.log_steps=100")
    trainer = Trainer(settings, tmp_path / "run", data.read_rows(settings.data.path or ""))
    poison(trainer, monkeypatch, {1, 4, 5})
    window = list(trainer.windows())[1]
    with pytest.raises(UserError, match=r"2 steps in a row, up to step 6, .* loss is nan; rows"):
        trainer.train()
    lines = metrics.read(tmp_path / "run" / metrics.FILE)
    told = [line for line in lines if "warning" in line]
    assert [line["step"] for line in told] == [2, 5, 6]
    assert told[0]["warning"] == f"loss is nan; rows {', '.join(window[1].where)}; the step is skipped (1 so far)"
    assert all(row.startswith(f"{rows_file}:") for row in window[1].where)
    assert [line["skipped"] for line in lines if "skipped" in line] == [1, 1, 2, 3]
    assert checkpoint.newest(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"
    saved = torch.load(tmp_path / "run" / "checkpoint-3" / "training_state.pt", weights_only=True)
    assert saved["progress"]["skipped"] == 1


def test_a_run_with_skipped_steps_resumes_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_config("training.max_skipped_steps=3")
    rows = data.read_rows(settings.data.path or "")
    whole = Trainer(settings, tmp_path / "whole", rows)
    poison(whole, monkeypatch, {3, 4})
    whole.train()
    killed = Trainer(settings, tmp_path / "killed", rows)
    poison(killed, monkeypatch, {3, 4})
    crash(killed, monkeypatch, "update 4")
    resumed = Trainer(settings, tmp_path / "killed", rows, resume=True)
    assert (resumed.progress.step, resumed.progress.skipped_in_a_row) == (4, 1)
    poison(resumed, monkeypatch, {4})
    resumed.train()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("coefficient", [0.01, 0.0])
def test_a_healthy_warm_up_raises_no_alarm_and_one_without_gradient_does(
    coefficient: float, make_config: MakeConfig, tmp_path: Path
) -> None:
    """B = 0: in the warm-up routers have the gradient of their losses alone, and A has none at the first step."""
    settings = make_config(
        "training.max_train_steps=24",
        "training.phases.1.step=12",
        "training.grad_accum_steps=1",
        "training.val_steps=0",
        f"moe.router_z_loss_coef={coefficient}",
        f"moe.load_balance.aux_loss_coef={coefficient}",
    )
    run(settings, tmp_path / "run")
    told = [line for line in metrics.read(tmp_path / "run" / metrics.FILE) if "warning" in line]
    if coefficient:
        assert told == []
    else:
        assert told[0]["step"] == 10
        assert "without a gradient in 10 steps: model.layers.0.mlp.gate_proj.router.weight" in told[0]["warning"]


def test_a_backend_that_cannot_run_here_is_an_error_to_mend(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora_kernels.backend.compiler_installed", lambda: False)
    with pytest.raises(UserError, match=r"kernels.backend: .*needs a C\+\+ compiler.*choose 'torch'"):
        run(make_config("kernels.backend=inductor"), tmp_path / "run")
