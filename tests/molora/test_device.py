"""Training, going on and answering on a device, from end to end: on a CPU always, on a GPU where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import molora
from molora import adapter, checkpoint, config, data, decode, generate, metrics, trainer
from molora.errors import UserError
from molora.trainer import Trainer
from tests.conftest import WORDS, make_rows, write_jsonl

TIMES = {"tokens_per_second", "seconds_per_step", "data_wait_share", "peak_memory_gb"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Large enough for tensor cores and for tiles that are not whole, small enough for a CPU."""
    folder = tmp_path_factory.mktemp("base")
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=320, num_hidden_layers=2, **shape)).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


def run(base: Path, folder: Path, name: str, device: str, *overrides: str, resume: bool = False) -> Path:
    rows = write_jsonl(folder / "rows.jsonl", make_rows(40))
    given = [
        f"model_name={base}", f"device={device}", f"data.path={rows}", "data.max_length=64", "data.cache=false",
        "injection.lora_r=8", "injection.lora_dropout=0.1", "training.lr=1e-2", "training.max_train_steps=6",
        "training.batch_size=4", "training.grad_accum_steps=2", "training.save_steps=3", "training.log_steps=1",
        "training.deterministic=true",
    ]  # fmt: skip
    settings = config.resolve(config.load(None, [*given, *overrides]))
    Trainer(settings, folder / name, data.read_rows(settings.data.path or ""), resume=resume).train()
    return folder / name


@pytest.mark.parametrize("kind", ["none", "non_reentrant"])
def test_two_stages_and_going_on_bit_for_bit(device: str, kind: str, base: Path, tmp_path: Path) -> None:
    settings = ["model.load_precision.mode=bf16", f"model.gradient_checkpointing={kind}"]
    phases = "training.phases=[{step: 0, trainable: [router]}, {step: 2, trainable: [router, lora, attn_lora]}]"
    one = run(base, tmp_path, "one", device, *settings, phases)
    lines = metrics.read(one / metrics.FILE)
    losses = [line["loss"] for line in lines]
    assert losses[-1] < losses[2], "the experts learn nothing"
    assert all(("peak_memory_gb" in line) == (device == "cuda") for line in lines)

    again = tmp_path / "again"
    shutil.copytree(one, again)
    shutil.rmtree(again / checkpoint.FINAL)
    shutil.rmtree(again / "checkpoint-6")
    run(base, tmp_path, "again", device, *settings, phases, resume=True)
    first, second = (
        [{name: value for name, value in line.items() if name not in TIMES} for line in metrics.read(o / metrics.FILE)]
        for o in (one, again)
    )
    assert first == second
    whole, resumed = (load_file(o / checkpoint.FINAL / "adapter.safetensors") for o in (one, again))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)

    two = run(one / checkpoint.FINAL, tmp_path, "two", device, *settings)
    assert metrics.read(two / metrics.FILE)[0]["loss"] < losses[3], "stage 2 does not begin where stage 1 ended"


def test_alike_is_refused_where_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 in its environment"):
        trainer.compute_alike()


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_is_bf16_where_a_gpu_has_it(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert adapter.pick_dtype(config.LoadPrecision(), torch.device("cuda:1")) == dtype


@pytest.mark.parametrize("rows", [1, 3])
def test_an_answer_token_by_token_is_the_one_from_its_definition(
    device: str, rows: int, base: Path, tmp_path: Path
) -> None:
    """With a cache few tokens are computed by :mod:`molora.decode`, without one the whole by the kernels."""
    trained = run(base, tmp_path, "one", device, "model.load_precision.mode=fp32") / checkpoint.FINAL
    model, tokenizer = molora.load(trained, device, "fp32")
    prompts = [tokenizer(" ".join((WORDS * 5)[i : i + 70 + i]))["input_ids"] for i in range(rows)]
    assert all(len(prompt) > decode.MOST_TOKENS for prompt in prompts)
    answers = generate.generate_tokens(model, tokenizer, prompts, max_new_tokens=8, batch_size=rows)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer.tokens:
            with torch.no_grad():
                logits = model(torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
            assert logits[token] > logits.max() - 1e-3  # two that are as good as equal may change places
            ids.append(token)
