"""A Llama small enough for every test, built on the fly: no weights are fetched."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests import fake_hub

# cuBLAS reads it once, and a test may ask for training.deterministic later.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# How often property tests try; `pytest --hypothesis-profile=thorough` once before a release.
settings.register_profile("default", max_examples=150, deadline=None)
settings.register_profile("thorough", max_examples=10_000, deadline=None)

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
TEXT = "what is the sum of one two three four five six seven it is a plain answer in a few words"
WORDS = TEXT.split()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Tests run side by side; more threads each would only make them wait for one another.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Commands that tests start write no tokens to the home of whoever runs them."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def make_tokenizer(*, chat_template: str | None, bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with ``bos`` it puts ``<|begin|>`` before each text by itself, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT + "\n\n"] * 8, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>" if bos else "<|im_start|>",
        eos_token="<|end|>" if bos else "<|im_end|>",
    )
    fast.chat_template = chat_template
    return fast


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and responses of random words, of several lengths."""
    draw = random.Random(seed)
    return [
        {"prompt": " ".join(draw.choices(WORDS, k=4)), "response": " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))}
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML with an injected system message, and no token before texts: like SmolLM2's."""
    return make_tokenizer(chat_template=CHATML, bos=False)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """No chat template, and a token before every text: like the Llama 3 base models'."""
    return make_tokenizer(chat_template=None, bos=True)


@pytest.fixture(scope="session")
def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: LlamaConfig, chat_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Folder with a random Llama (2 layers, hidden 64) and the ChatML tokenizer, as a hub model would be."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.Hub]:
    """An empty hub on this machine, for the real clients; and an empty cache of what they fetch."""
    constants = huggingface_hub.constants
    with fake_hub.serving() as hub:
        # Read from the environment when the library is imported, and from there by what is made at import.
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        yield hub


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """48 rows of prompt and response."""
    return write_jsonl(tmp_path / "rows.jsonl", make_rows(48))
