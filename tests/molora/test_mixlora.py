"""Experts that are whole MLPs against their definition, and MixLoRAs that the real MoE-PEFT made: equal logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from molora import convert, routing
from molora.errors import UserError
from molora.layers import ExpertMLPs

IDS = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(9))
WHOLE = {"router_scope": "mlp", "expert_scope": "mlp"}


def patched(config: LlamaConfig, dtype: torch.dtype, init_b_std: float = 0.2, **injection: object) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).to(dtype)
        molora.inject(model, {"injection": {"lora_r": 4, "init_b_std": init_b_std, **injection}, "moe": WHOLE})
    for group in molora.parameter_groups(model).values():
        for _, parameter in group:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    return model.eval()


def definition(mlp: ExpertMLPs, x: Tensor, top_k: int) -> Tensor:
    """The sum of whole MLPs, each computed by itself."""
    assert mlp.router is not None
    logits = F.linear(x, mlp.router.weight, mlp.router.bias)
    best = logits.topk(top_k, dim=-1)
    gates = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))

    def project(name: str, e: int, x: Tensor) -> Tensor:
        m = mlp.get_submodule(name)
        own = slice(e * m.rank, (e + 1) * m.rank)
        return F.linear(x, m.base.weight + m.scaling * m.lora_b[:, own] @ m.lora_a[own])

    def expert(e: int) -> Tensor:
        return project("down_proj", e, F.silu(project("gate_proj", e, x)) * project("up_proj", e, x))

    return sum((gates[..., e : e + 1] * expert(e) for e in range(gates.shape[-1])), torch.zeros_like(x))


@pytest.mark.parametrize("top_k", [2, 4])
def test_forward_and_backward_are_those_of_the_definition(tiny_config, top_k):
    model = patched(tiny_config, torch.float64, top_k=top_k)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, ExpertMLPs)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 7, 64, dtype=torch.float64, generator=generator).requires_grad_()
    dy = torch.randn(3, 7, 64, dtype=torch.float64, generator=generator)
    trained = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    assert len(trained) == 1 + 3 * 2 + 2
    y, expected = mlp(x), definition(mlp, x, top_k)
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(out, trained, dy) for out in (y, expected))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)


def test_starts_as_the_base_but_for_rounding(tiny_config):
    model = patched(tiny_config, torch.float32, init_b_std=0.0)
    logits = model(IDS).logits
    torch.testing.assert_close(logits, molora.remove(model)(IDS).logits)


@pytest.mark.parametrize("kind", [False, True])
def test_recomputing_with_dropout_changes_no_gradient(tiny_config, kind):
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = patched(tiny_config, torch.float32, lora_dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        record = routing.record(model, torch.ones_like(IDS))
        with routing.using(model, record):
            loss = model(IDS, labels=IDS).loss
            routing.combine(model, [record])
            loss.backward()
        return [p.grad for group in molora.parameter_groups(model).values() for _, p in group if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) == 2 * (3 * 2 + 2 + 4 * 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in plain)


def test_saves_and_loads(tiny_model_dir, tmp_path):
    model, _ = molora.load(tiny_model_dir, "cpu", "fp32")
    molora.inject(model, {"injection": {"lora_r": 4, "init_b_std": 0.2}, "moe": WHOLE})
    molora.save_adapter(model, tmp_path / "a")
    again, _ = molora.load(tmp_path / "a", "cpu", "fp32")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_whole_experts_need_one_router_a_block(tiny_config):
    with pytest.raises(UserError, match="needs router_scope: mlp"):
        molora.inject(LlamaForCausalLM(tiny_config), {"injection": {}, "moe": {"expert_scope": "mlp"}})


# --- adapters of MoE-PEFT ----------------------------------------------------------------------------------------

CONFIG = {
    "name": "it", "task_name": "casual", "r": 4, "lora_alpha": 12, "lora_dropout": 0.05, "num_experts": 4, "top_k": 2,
    "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], "routing_strategy": "mixlora",
}  # fmt: skip


@pytest.fixture
def trained(tiny_model_dir, tiny_config, tmp_path, monkeypatch) -> tuple[Path, Tensor]:
    """A folder as MoE-PEFT writes it, and the logits of its model."""
    pytest.importorskip("moe_peft")
    from moe_peft.adapters.mixlora.config import MixLoraConfig  # type: ignore[import-not-found]
    from moe_peft.common import LLMBatchConfig, LLMModelInput  # type: ignore[import-not-found]
    from moe_peft.model import LLMModel  # type: ignore[import-not-found]

    theta = tiny_config.rope_parameters["rope_theta"]
    monkeypatch.setattr(LlamaConfig, "rope_theta", theta, raising=False)  # where transformers 4 had it
    model = LLMModel.from_pretrained(str(tiny_model_dir), device="cpu", load_dtype=torch.float32)
    model.init_adapter(MixLoraConfig.from_config(copy.deepcopy(CONFIG)))
    weights = model.get_adapter_weight_dict("it")
    assert len(weights) == 2 * (1 + 3 * 2 * 4 + 2 * 2)
    generator = torch.Generator().manual_seed(10)
    for weight in weights.values():
        weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    folder = tmp_path / "mixlora"
    folder.mkdir()
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(model.adapter_configs_["it"].export()))
    for layer in model.model_.layers_:  # its LoRAs are no submodules and would drop for ever
        for part in layer.state_dict():
            for linear in part.values():
                for lora in linear.loras_.values():
                    lora.dropout_.p = 1e-12  # it takes no 0
    whole, mask = [LLMBatchConfig("it", 0, 2)], torch.ones_like(IDS).tolist()
    given = LLMModelInput(whole, batch_tokens_=IDS.tolist(), batch_masks_=mask, inference_mode_=True)
    with torch.no_grad():
        (output,) = model(given)
    return folder, output.logits


def run(*arguments: object) -> None:
    convert.main(["import", *map(str, arguments), "--device", "cpu", "--precision", "fp32"])


def test_imported_adapter_has_moe_pefts_logits(trained, tiny_model_dir, tmp_path):
    folder, expected = trained
    run(folder, tmp_path / "adapter", "--base", tiny_model_dir)
    model, _ = molora.load(tmp_path / "adapter", "cpu", "fp32")
    with torch.no_grad():
        logits = model(IDS).logits
        base = molora.load(tiny_model_dir, "cpu", "fp32")[0](IDS).logits
    largest = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * largest)
    assert (base - expected).abs().max() > 1e-2 * largest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 1}, "top_k is 1"),
        ({"routing_strategy": "mixlora-switch"}, "routing_strategy is mixlora-switch"),
        ({"use_dora": True}, "no DoRA"),
        ({"act_fn": "gelu"}, "act_fn is gelu"),
        ({"expert_lora": {"r": 8}}, r"\(8, 12.0\) for experts, \(4, 12.0\)"),
        ({"num_experts": 3}, "has 1 of|no place in this base|would be"),
    ],
)
def test_what_does_not_fit_is_refused(trained, tiny_model_dir, tmp_path, change, message):
    folder, _ = trained
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "a", "--base", tiny_model_dir)
    assert not (tmp_path / "a").exists()
