"""Every row of the table, and architectures without one, on a tiny random model of that architecture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import molora
from molora import preflight
from molora.config import Config
from molora.data import Collate, Example, Examples
from molora.errors import UserError
from molora.evaluate import answer_losses
from molora.families import FAMILIES, family_of
from molora.layers import LoraLinear
from molora.loss import causal_lm_loss, check_head
from molora.packing import pack

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
WINDOW = 4
"""Shorter than the texts below, so that a window changes what the model says."""
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
GEMMA_3 = TIED | SLIDING | {"query_pre_attn_scalar": 16}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", UNTIED | {"num_key_value_heads": 4}),  # multi-head attention
    "llama 3": ("llama", UNTIED | {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama 3.1": ("llama", UNTIED | LLAMA3),
    "llama 3.2": ("llama", TIED | LLAMA3),
    "smollm2": ("llama", TIED | {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "mistral": ("mistral", UNTIED | {"sliding_window": WINDOW}),
    "qwen 2.5": ("qwen2", TIED),
    "qwen 2.5, windows": ("qwen2", UNTIED | SLIDING | {"use_sliding_window": True}),
    "qwen 3": ("qwen3", TIED),
    "gemma": ("gemma", TIED | {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma 2": ("gemma2", TIED | SLIDING | {"attn_logit_softcapping": 0.05, "final_logit_softcapping": 0.05}),
    "gemma 3, text": ("gemma3_text", GEMMA_3),
    "gemma 3": (
        "gemma3",
        {"text_config": TINY | GEMMA_3, "vision_config": VISION, "mm_tokens_per_image": 4}
        | {"image_token_id": 63, "boi_token_index": 62, "eoi_token_index": 61},
    ),
    "phi 3": ("phi3", UNTIED | {"num_key_value_heads": 4}),
    "phi 3, windows, grouped": ("phi3", UNTIED | {"sliding_window": WINDOW}),
    # Without a row: Llama's names, logits with a factor, its own names.
    "olmo 2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 8.0}),
    "cohere": ("cohere", {"logit_scale": 0.0625}),
    "gpt-neox": ("gpt_neox", {}),
}
NEOX = {
    "target_keywords": ["dense_h_to_4h", "dense_4h_to_h"],
    "attn_lora": {"keywords": ["query_key_value", "dense"]},
}
IDS = torch.arange(14).view(2, 7)


def tiny(name: str) -> Any:
    """The model ``name`` with random weights, small; biases too, which start at zero, where a lost one would not
    show."""
    family, special = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | special)).float().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.normal_()
    return model


def test_every_row_has_a_model():
    assert {family for family, _ in MODELS.values()} >= FAMILIES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_step_0_is_the_base_every_adapter_trains_and_a_folder_round_trips(name, tmp_path, chat_tokenizer):
    tiny(name).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    model, _ = molora.load(tmp_path / "base", device="cpu", precision="fp32")
    expected = model(IDS).logits

    molora.inject(model, {"lora_r": 2, "num_experts": 3} | (NEOX if name == "gpt-neox" else {}))
    assert torch.equal(model(IDS).logits, expected)

    adapters = [item for group in molora.parameter_groups(model).values() for item in group]
    with torch.no_grad():
        for _, parameter in adapters:
            parameter.normal_(std=0.1)
    model(IDS).logits.square().mean().backward()
    assert not [path for path, p in adapters if p.grad is None or not p.grad.abs().sum() > 0]

    long = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **long, use_cache=True), model.generate(IDS, **long, use_cache=False))

    molora.save_adapter(model, tmp_path / "adapter")
    again, _ = molora.load(tmp_path / "adapter", device="cpu", precision="fp32")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def logits(name: str, **changed: Any) -> torch.Tensor:
    """Of the same weights under a configuration in which some keys are ``changed``."""
    model = tiny(name)
    config = copy.deepcopy(model.config)
    for key, value in changed.items():
        setattr(config.get_text_config(), key, value)
    config._attn_implementation = "eager"  # which knows of every key; transformers 5.17 caps no scores in sdpa
    other = type(model)(config).float().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return other(IDS).logits


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama 3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        ("llama 3.1", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
        ("llama 3.2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen 2.5, windows", {"layer_types": ["full_attention"] * 2}),
        ("gemma 2", {"layer_types": ["full_attention"] * 2}),
        ("gemma 2", {"attn_logit_softcapping": None}),
        ("gemma 2", {"final_logit_softcapping": None}),
        ("gemma 3, text", {"layer_types": ["full_attention"] * 2}),
        ("gemma 3", {"layer_types": ["full_attention"] * 2}),
        ("phi 3, windows, grouped", {"sliding_window": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
    ],
)
def test_the_tiny_models_have_what_sets_their_family_apart(name, changed):
    assert torch.equal(logits(name), logits(name))
    assert not torch.equal(logits(name), logits(name, **changed))


def test_the_tiny_models_are_built_as_their_family_is():
    for name in MODELS:
        model = tiny(name)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == model.config.get_text_config().tie_word_embeddings, name
        attention = model.get_submodule(family_of(model).layers)[0]
        attention = getattr(attention, "self_attn", attention)
        norms = {"q_norm", "k_norm"} <= dict(attention.named_children()).keys()
        assert norms == (name in ("qwen 3", "gemma 3, text", "gemma 3", "olmo 2")), name
        q = getattr(attention, "q_proj", None)
        assert (q is not None and q.bias is not None) == name.startswith("qwen 2.5"), name


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_training_and_evaluation_are_the_models_own(name, chat_tokenizer):
    """Windows, softcaps and factors included; rows packed and not. The tolerance is rounding of fp32."""
    model = tiny(name).requires_grad_(False)
    check_head(model)
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (length,), generator=draw, dtype=torch.int32) for length in (9, 6, 5)]
    rows = Examples([Example(row, row.clone(), "") for row in ids], 0, 0)
    own = [model(input_ids=row[None].long(), labels=row[None].long()).loss * (len(row) - 1) for row in ids]
    collate = Collate(chat_tokenizer)
    for examples in (rows, pack(rows, 16)):
        total, tokens = causal_lm_loss(model, collate(examples.rows))
        assert tokens == sum(map(len, ids)) - len(ids)
        torch.testing.assert_close(total, torch.stack(own).sum())
    torch.testing.assert_close(answer_losses(model, collate(rows.rows)), torch.stack(own))


def test_a_head_with_a_factor_of_its_own_is_refused():
    """Of one name with Granite's, by which logits are divided there and multiplied here."""
    config = AutoConfig.for_model("hyperclovax", **TINY, logits_scaling=0.5)
    with pytest.raises(UserError, match="hyperclovax models make their logits in a way that this loss does not know"):
        check_head(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_estimated(name):
    injection = {"lora_r": 2} | (NEOX if name == "gpt-neox" else {})
    need = preflight.need(Config(injection=injection), tiny(name).config, torch.float32, preflight.Shape(2, 9, 12))
    assert need.peak > need.base > 0


def test_fused_projections_answer_to_the_names_of_their_parts():
    model = tiny("phi 3")
    molora.inject(model, {"lora_r": 2, "attn_lora": {"keywords": ["q_proj"]}})
    layer = model.model.layers[0]
    found = {path for path, module in layer.named_modules() if isinstance(module, LoraLinear)}
    assert found == {"self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"}


def test_an_architecture_without_a_row_names_its_linears_and_one_without_layers_is_refused():
    model = tiny("gpt-neox")
    with pytest.raises(molora.UserError, match=r"'gate_proj' matches no projection.*'mlp.dense_h_to_4h'"):
        molora.inject(model, {"lora_r": 2})
    with pytest.raises(molora.UserError, match=r"no row in molora/families\.py.*module lists: none"):
        molora.inject(torch.nn.Linear(2, 2), {"lora_r": 2})


def test_layers_of_an_architecture_without_a_row_are_looked_for_in_its_decoder(monkeypatch):
    monkeypatch.delitem(FAMILIES, "gemma3")
    model = tiny("gemma 3")
    assert len(model.model.vision_tower.encoder.layers) > len(model.model.language_model.layers)
    assert family_of(model).layers == "model.language_model.layers"


@pytest.mark.parametrize(
    ("family", "special"),
    [
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16}),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 48}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_a_mixture_of_experts_is_refused_unless_its_linears_are_named_by_path(family, special):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | special))
    with pytest.raises(molora.UserError, match=r"experts already, stacked in .*gate_up_proj.*'self_attn\.q_proj'"):
        molora.inject(model, {"lora_r": 2})
    assert not hasattr(model, "molora")
    molora.inject(model, {"lora_r": 2, "target_keywords": ["self_attn.o_proj"], "attn_lora": {"enabled": False}})
    assert len(molora.parameter_groups(model)["lora"]) == 4
