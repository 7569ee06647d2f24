from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
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


def test_the_page_has_the_times_that_are_printed() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "scaling.md"
    assert scaling.times() in page.read_text(encoding="utf-8")


def test_arithmetic_of_a_step_is_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a frozen base; within 1 %, since norms have parameters and no products. torch counts what is masked, too, so
    attention's part stands twice."""
    for name, value in {"ROWS": 1, "TOKENS": 64, "MICRO_BATCHES": 1, "EXPERTS": 0, "RANK": 0}.items():
        monkeypatch.setattr(scaling, name, value)
    shape = scaling.Shape(layers=2, hidden=128, intermediate=192, kv=64, vocabulary=100, tied=False)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # Recomputing a layer stops before its last product, which the formula counts: it need not stop (grouped experts,
    # reentrant checkpointing).
    with FlopCounterMode(display=False) as counted, set_checkpoint_early_stop(False):
        logits = model(inputs_embeds=torch.randn(1, 64, 128, requires_grad=True), use_cache=False).logits
        logits.backward(torch.randn_like(logits))
    masked = 2 * 64 * (4 * 2 * 64 * 128)
    assert counted.get_total_flops() == pytest.approx(scaling.flops(shape) + masked, rel=0.01)


def test_time_is_worked_out_from_a_measured_step() -> None:
    row = {"variant": "molora", "total_ms": 900.0, "update_ms": 200.0}
    result = {"shape": {"model": "llama3.2-3b", "rows": 8, "length": 1024}, "rows": [{"variant": "frozen base"}, row]}
    own = scaling.MODELS["3B"]
    assert scaling.seconds(own, 1, "fsdp", scaling.H100, scaling.rate(result)) == pytest.approx((2.0, 2.0))
    with pytest.raises(ValueError, match="not of the recipe"):
        scaling.rate(result | {"shape": result["shape"] | {"length": 512}})


def test_ddp_waits_for_all_that_it_sends_and_fsdp_for_what_computing_does_not_hide() -> None:
    large = scaling.MODELS["70B"]
    computing = scaling.flops(large) / scaling.H100.flops
    ddp, fsdp = (scaling.sent(large, 64, p) / 50e9 for p in ("ddp", "fsdp"))
    assert scaling.seconds(large, 64, "ddp", scaling.H100, scaling.H100.flops)[0] == computing + ddp
    assert scaling.seconds(large, 64, "fsdp", scaling.H100, scaling.H100.flops) == (fsdp, computing + fsdp)
