"""Checkpoints that the real EulerForge made, in molora: equal logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import molora
from molora import convert
from molora.errors import UserError

IDS = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(9))


@pytest.fixture
def trained(tiny_model_dir, tmp_path) -> tuple[Path, torch.Tensor]:
    """A run folder as EulerForge writes it, and the logits of its model."""
    from eulerforge.adapters.backbones.llama import LlamaAdapter  # type: ignore[import-not-found]
    from eulerforge.cli.train import _save_lora_info  # type: ignore[import-not-found]
    from eulerforge.injection.dense_lora import DenseLoRAInjection  # type: ignore[import-not-found]

    injection = {
        "strategy": "mixture_lora", "num_experts": 4, "top_k": 2, "lora_r": 4, "lora_alpha": 12.0,
        "target_keywords": ["gate_proj", "up_proj", "down_proj"],
        "attn_lora": {"enabled": True, "keywords": ["q_proj", "v_proj"]},
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    injector = DenseLoRAInjection()
    injector.apply(
        model=model, adapter=LlamaAdapter(), mode=injector.MODE_MIXTURE_LORA, start_layer=1, num_layers=1, r=4,
        alpha=12.0, dropout=0.0, target_keywords=injection["target_keywords"], num_experts=4, top_k=2,
        attn_lora_cfg=injection["attn_lora"],
    )  # fmt: skip
    model.eval()
    generator = torch.Generator().manual_seed(10)
    wrapped = 0
    for name, parameter in model.named_parameters():
        if "router" in name or "lora" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
            wrapped += 1
    assert wrapped == 3 * (2 + 2 * 4) + 2 * 2
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(tmp_path / "run" / "final")
    _save_lora_info({"injection": injection}, str(tmp_path / "run" / "final"))
    (tmp_path / "run" / "resolved_config.json").write_text(json.dumps({"injection": injection, "backbone": "llama"}))
    return tmp_path / "run" / "final", expected


def run(*arguments: object) -> None:
    convert.main(["import", *map(str, arguments), "--device", "cpu", "--precision", "fp32"])


def test_imported_checkpoint_has_eulerforges_logits(trained, tiny_model_dir, tmp_path):
    folder, expected = trained
    run(folder, tmp_path / "adapter", "--base", tiny_model_dir)
    model, tokenizer = molora.load(tmp_path / "adapter", "cpu", "fp32")
    with torch.no_grad():
        logits = model(IDS).logits
        base = molora.load(tiny_model_dir, "cpu", "fp32")[0](IDS).logits
    largest = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * largest)
    assert (base - expected).abs().max() > 1e-2 * largest
    assert tokenizer is not None and len(molora.parameter_groups(model)["router"]) == 6


def test_what_does_not_fit_is_refused(trained, tiny_model_dir, tmp_path):
    folder, _ = trained
    config = folder.parent / "resolved_config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"top_k": 2', '"top_k": 1'))
    with pytest.raises(UserError, match="top_k is 1"):
        run(folder, tmp_path / "a", "--base", tiny_model_dir)
    config.write_text(whole.replace("mixture_lora", "moe_expert_lora"))
    with pytest.raises(UserError, match="only mixture_lora"):
        run(folder, tmp_path / "a", "--base", tiny_model_dir)
    config.write_text(whole)
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    molora.load(tiny_model_dir)[1].save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"model\.norm\.weight differs"):
        run(folder, tmp_path / "a", "--base", tmp_path / "other")
    with pytest.raises(UserError, match="no routers"):
        (tmp_path / "run" / "plain").mkdir()
        molora.load(tiny_model_dir)[0].save_pretrained(tmp_path / "run" / "plain")
        run(tmp_path / "run" / "plain", tmp_path / "a", "--base", tiny_model_dir)
    assert not (tmp_path / "a").exists()
