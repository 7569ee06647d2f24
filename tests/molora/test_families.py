"""Every row of the table, on a tiny random model of that architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import molora
from molora.families import FAMILIES

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_is_the_base_every_adapter_trains_and_a_folder_round_trips(family, tmp_path, chat_tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start at zero, where a lost bias would not show
                parameter.normal_()
    model.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    model, _ = molora.load(tmp_path / "base", device="cpu", precision="fp32")
    ids = torch.arange(14).view(2, 7)
    expected = model(ids).logits

    molora.inject(model, {"lora_r": 2, "num_experts": 3})
    assert torch.equal(model(ids).logits, expected)

    adapters = [item for group in molora.parameter_groups(model).values() for item in group]
    with torch.no_grad():
        for _, parameter in adapters:
            parameter.normal_(std=0.1)
    model(ids).logits.square().mean().backward()
    assert not [name for name, p in adapters if p.grad is None or not p.grad.abs().sum() > 0]

    molora.save_adapter(model, tmp_path / "adapter")
    again, _ = molora.load(tmp_path / "adapter", device="cpu", precision="fp32")
    assert torch.equal(again(ids).logits, model(ids).logits)
