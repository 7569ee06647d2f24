"""The estimate against what a real step allocates on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from molora import adapter, cli, config, data, preflight, train
from molora.trainer import Trainer
from tests.conftest import make_rows, write_jsonl

MakeConfig = Callable[..., config.Config]


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Large enough that tensors, not the allocator's small change, decide; a vocabulary whose logits count."""
    folder = tmp_path_factory.mktemp("wide_llama")
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=2000, num_hidden_layers=3, **shape)).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(wide_model_dir: Path, tmp_path: Path) -> MakeConfig:
    def make(*overrides: str) -> config.Config:
        defaults = [
            f"model_name={wide_model_dir}",
            f"data.path={write_jsonl(tmp_path / 'rows.jsonl', make_rows(16))}",
            "data.max_length=96",
            "device=cpu",
            "model.load_precision.mode=fp32",
            "injection.lora_r=4",
            "training.max_train_steps=100",
            "training.batch_size=8",
            "training.grad_accum_steps=2",
        ]
        return config.resolve(config.load(None, [*defaults, *overrides]))

    return make


def peak_of_a_step(settings: config.Config, output: Path) -> tuple[int, preflight.Shape]:
    """Bytes alive at the worst moment of the run's second step, counted by the profiler from every allocation."""
    trainer = Trainer(settings, output, data.read_rows(settings.data.path or ""))
    trainer.model.train()
    trainer.enter_phase()
    window = [next(trainer.windows())[0]] * settings.training.grad_accum_steps  # all as large as the first
    trainer.train_step(window)  # makes the optimizer's state
    trainer.optimizer.zero_grad(set_to_none=True)
    tensors: list[Tensor] = [*trainer.model.parameters(), *trainer.model.buffers()]
    tensors += [t for state in trainer.optimizer.state.values() for t in state.values()]
    static = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.train_step(window)
    trace = output.with_suffix(".json")
    profiled.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return static + peak, preflight.Shape(*window[0].input_ids.shape, window[0].label_tokens)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.grad_accum_steps=1"],
        ["model.gradient_checkpointing=non_reentrant"],
        ["model.gradient_checkpointing=reentrant"],
        ["moe.load_balance.scope=micro_batch", "training.grad_accum_steps=4"],
        ["data.packing=true"],
        ["model.load_precision.mode=int4", "model.load_precision.compute_dtype=fp32"],
        [
            "model.load_precision.mode=int4",
            "model.load_precision.compute_dtype=fp32",
            "model.gradient_checkpointing=non_reentrant",
        ],
        ["injection.strategy=dense_lora", "model.attn_implementation=eager"],
    ],
    ids=lambda overrides: " ".join(overrides) or "defaults",
)
def test_the_estimate_is_the_measured_peak(overrides: list[str], make_config: MakeConfig, tmp_path: Path) -> None:
    """At most 5 % below: what an operator allocates and frees within one call is seen by the profiler alone. At most
    10 % above: on fake tensors transformers makes a mask, and repeats keys and values, for attention that needs none.
    """
    settings = make_config(*overrides)
    measured, shape = peak_of_a_step(settings, tmp_path / "run")
    base, _ = adapter.describe_base(settings)
    need = preflight.need(settings, base, torch.float32, shape)
    print(f"measured {measured:,}, estimated {need.peak:,}: {need.peak / measured:.3f}")
    assert 0.95 < need.peak / measured < 1.10


@pytest.mark.parametrize("tied", [True, False])
def test_the_base_is_as_large_as_the_loaded_one(
    tied: bool,
    make_config: MakeConfig,
    tiny_config: LlamaConfig,
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    shape = LlamaConfig(**tiny_config.to_dict() | {"tie_word_embeddings": tied})
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    model, _ = adapter.load(tmp_path / "model", "cpu", "fp32")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    base, _ = adapter.describe_base(settings := make_config(f"model_name={tmp_path / 'model'}"))
    found = preflight.need(settings, base, torch.float32, preflight.Shape(1, 8, 4)).base
    assert found == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_many_micro_batches_are_extrapolated_exactly(make_config: MakeConfig) -> None:
    base, _ = adapter.describe_base(make_config())
    shape = preflight.Shape(8, 60, 200)
    one, two, five = (
        preflight.need(make_config(f"training.grad_accum_steps={n}"), base, torch.float32, shape) for n in (1, 2, 5)
    )
    assert five.activations - two.activations == 3 * (two.activations - one.activations)
    alone = "moe.load_balance.scope=micro_batch"
    held, also = (
        preflight.need(make_config(f"training.grad_accum_steps={n}", alone), base, torch.float32, shape) for n in (2, 5)
    )
    assert held == also
    assert held.activations == one.activations


def test_the_largest_batch_is_made_of_the_longest_rows(
    make_config: MakeConfig, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = make_config("training.batch_size=3")
    examples = data.encode_rows(chat_tokenizer, data.read_rows(settings.data.path or ""), 96)
    largest = preflight.largest_batch(settings, examples)
    for batch in data.batches(examples, data.Collate(chat_tokenizer), batch_size=3):
        assert batch.input_ids.shape[1] <= largest.length
        assert batch.label_tokens <= largest.labels
    assert largest.rows == 3


def preflown(capsys: pytest.CaptureFixture[str], settings: config.Config, folder: Path, *arguments: str) -> str:
    """What the command prints; it must leave the output folder alone."""
    preset = folder / "preset.yml"
    preset.write_text(config.to_yaml(settings))
    output = folder / "run"
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: train.main(["--preset", str(preset), "--output-dir", str(output), "--preflight", *arguments]))
    assert exit_.value.code == 0
    assert not output.exists()
    return capsys.readouterr().out


def test_the_command_shows_memory_steps_and_time(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = preflown(capsys, make_config(), tmp_path)
    for label in ("base, float32", "adapters", "optimizer", "gradients", "activations", "logits", "peak"):
        assert label in shown
    assert "none (set)" in shown
    assert "100 steps of 8 x 2" in shown
    assert "100.00 epochs of 16 rows" in shown
    assert "fits: 0.01 GB of the" in shown
    assert " s per step, probed in 3" in shown


def test_one_step_is_probed_where_it_takes_long(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PROBE_SECONDS", 0.0)
    assert " s per step, probed in 1" in preflown(capsys, make_config(), tmp_path)


def test_what_does_not_fit_is_warned_of_with_settings_that_do(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "CUDA_CONTEXT", 0)
    shown = preflown(capsys, make_config(), tmp_path, "--memory-gb", "0.0055")
    assert "warning: does not fit" in shown
    assert "time: not probed" in shown
    [line] = [line for line in shown.splitlines() if line.startswith("would fit: ")]
    assert "model.gradient_checkpointing=non_reentrant" in line
    assert "training.batch_size=" in line
    settings = make_config(*[word for word in line.split() if "=" in word])
    assert settings.training.batch_size * settings.training.grad_accum_steps == 16
    assert settings.training.max_train_steps == 100
    assert "fits: " in preflown(capsys, settings, tmp_path, "--memory-gb", "0.0055")
    hopeless = preflown(capsys, make_config(), tmp_path, "--memory-gb", "0.001")
    assert "no batch size or length would make it fit" in hopeless


def test_advice_for_a_preset_in_micro_batches_keeps_its_rows(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "CUDA_CONTEXT", 0)
    phases = "training.phases=[{step: 0, trainable: [router]}, {step: 20, trainable: [lora]}]"
    micro = make_config(phases)
    counted = micro.training.model_copy(update={"step_unit": "micro"})
    shown = preflown(capsys, micro.model_copy(update={"training": counted}), tmp_path, "--memory-gb", "0.0055")
    [line] = [line for line in shown.splitlines() if line.startswith("would fit: ")]
    settings = make_config(phases, *[word for word in line.split() if "=" in word])
    assert settings.training.batch_size * settings.training.grad_accum_steps == 16
    assert settings.training.max_train_steps == 50
    assert [phase.step for phase in settings.training.phases] == [0, 10]


@pytest.mark.parametrize("arguments", [["--memory-gb", "24"], ["--preflight", "--memory-gb", "0"]])
def test_memory_is_a_number_for_preflight(
    arguments: list[str], make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "preset.yml"
    preset.write_text(config.to_yaml(make_config()))
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: train.main(["--preset", str(preset), *arguments]))
    assert exit_.value.code == 2
    assert "--memory-gb" in capsys.readouterr().err
