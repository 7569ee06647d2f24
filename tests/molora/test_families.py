"""Every row of the table, and architectures without one, on a tiny random model of that architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import molora
from molora.families import FAMILIES
from molora.layers import LoraLinear

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_ROW = {
    "olmo2": {},  # Llama's names
    "gpt_neox": {  # its own
        "target_keywords": ["dense_h_to_4h", "dense_4h_to_h"],
        "attn_lora": {"keywords": ["query_key_value", "dense"]},
    },
}


@pytest.mark.parametrize("family", [*FAMILIES, *NO_ROW])
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

    molora.inject(model, {"lora_r": 2, "num_experts": 3} | NO_ROW.get(family, {}))
    assert torch.equal(model(ids).logits, expected)

    adapters = [item for group in molora.parameter_groups(model).values() for item in group]
    with torch.no_grad():
        for _, parameter in adapters:
            parameter.normal_(std=0.1)
    model(ids).logits.square().mean().backward()
    assert not [name for name, p in adapters if p.grad is None or not p.grad.abs().sum() > 0]

    long = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **long, use_cache=True), model.generate(ids, **long, use_cache=False))

    molora.save_adapter(model, tmp_path / "adapter")
    again, _ = molora.load(tmp_path / "adapter", device="cpu", precision="fp32")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_fused_projections_answer_to_the_names_of_their_parts():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **TINY))
    molora.inject(model, {"lora_r": 2, "attn_lora": {"keywords": ["q_proj"]}})
    layer = model.model.layers[0]
    found = {path for path, module in layer.named_modules() if isinstance(module, LoraLinear)}
    assert found == {"self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"}


def test_an_architecture_without_a_row_names_its_linears_and_one_without_layers_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **TINY))
    with pytest.raises(molora.UserError, match=r"'gate_proj' matches no projection.*'mlp.dense_h_to_4h'"):
        molora.inject(model, {"lora_r": 2})
    with pytest.raises(molora.UserError, match=r"no row in molora/families\.py.*module lists: none"):
        molora.inject(torch.nn.Linear(2, 2), {"lora_r": 2})
