from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from bench import scaling


@pytest.mark.parametrize("tied", [True, False])
def test_the_formulas_count_what_a_model_has(tied: bool) -> None:
    shape = scaling.Shape(layers=2, hidden=64, intermediate=96, kv=32, vocabulary=100, tied=tied)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == scaling.base(shape)
    molora.inject(model, {"num_experts": 4, "top_k": 2, "lora_r": 32})
    adapters = sum(p.numel() for members in molora.parameter_groups(model).values() for _, p in members)
    assert adapters == shape.layers * scaling.layer_adapters(shape)


def test_the_page_has_the_table_that_is_printed() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "scaling.md"
    assert scaling.table() in page.read_text(encoding="utf-8")
