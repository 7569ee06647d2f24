"""A few tokens without a gradient take their own path: the same numbers, never from parameters of yesterday."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

import molora
from molora import decode
from tests.molora.test_patch import PLACEMENTS

IDS = torch.randint(0, 320, (2, 5), generator=torch.Generator().manual_seed(11))


def patched(tiny_config, placement, dtype=torch.float64):
    torch.manual_seed(12)
    model = LlamaForCausalLM(copy.deepcopy(tiny_config)).eval()
    placement = copy.deepcopy(placement)
    placement["injection"]["init_b_std"] = 0.1
    molora.inject(model, placement).to(dtype)
    for group in molora.parameter_groups(model).values():
        for _, parameter in group:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    return model


def both_ways(model, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        quick = model(IDS).logits
        with monkeypatch.context() as patch:
            patch.setattr(decode, "MOST_TOKENS", 0)
            return quick, model(IDS).logits


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_same_numbers_as_the_kernels(tiny_config, placement, top_k, monkeypatch):
    settings = {**placement, "injection": {**placement["injection"], "top_k": top_k}}
    quick, slow = both_ways(patched(tiny_config, settings), monkeypatch)
    torch.testing.assert_close(quick, slow, rtol=1e-11, atol=1e-12)


def test_equal_logits_choose_the_first_experts(tiny_config, monkeypatch):
    model = patched(tiny_config, PLACEMENTS["recipe"])
    for _, parameter in molora.parameter_groups(model)["router"]:
        parameter.data.zero_()
    quick, slow = both_ways(model, monkeypatch)
    torch.testing.assert_close(quick, slow, rtol=1e-11, atol=1e-12)


def test_bf16_is_as_near_to_fp64_as_the_kernels_are(tiny_config, monkeypatch):
    quick, slow = both_ways(patched(tiny_config, PLACEMENTS["recipe"], torch.bfloat16), monkeypatch)
    exact = patched(tiny_config, PLACEMENTS["recipe"], torch.bfloat16).double()
    with torch.no_grad():
        exact = exact(IDS).logits
    assert (quick.double() - exact).norm() <= 2 * (slow.double() - exact).norm()


@pytest.mark.parametrize("change", ["in place", "data", "parameter", "training step"])
def test_a_changed_parameter_is_seen(tiny_config, change, monkeypatch):
    model = patched(tiny_config, PLACEMENTS["recipe"])
    before, _ = both_ways(model, monkeypatch)
    for module in (model.model.layers[0].mlp.up_proj, model.model.layers[1].self_attn.k_proj):
        if change == "in place":
            with torch.no_grad():
                module.lora_b.mul_(2)
        elif change == "data":
            module.lora_b.data = 2 * module.lora_b.data
        elif change == "parameter":
            module.lora_b = torch.nn.Parameter(2 * module.lora_b.detach())
    if change == "training step":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    after, slow = both_ways(model, monkeypatch)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, slow, rtol=1e-11, atol=1e-12)


def test_a_fused_step_which_does_not_mark_what_it_changed_is_seen(tiny_config, monkeypatch):
    model = patched(tiny_config, PLACEMENTS["recipe"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        before = model(IDS).logits
    optimizer.step()
    optimizer.zero_grad()
    after, slow = both_ways(model, monkeypatch)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, slow, rtol=1e-11, atol=1e-12)


def test_the_path_is_taken_without_gradient_alone(tiny_config, monkeypatch):
    model, calls = patched(tiny_config, PLACEMENTS["recipe"]), []
    call = decode.Kept.__call__
    monkeypatch.setattr(decode.Kept, "__call__", lambda self, *args: calls.append(1) or call(self, *args))
    model(IDS)
    assert not calls
    with torch.no_grad():
        model(IDS)
        # two layers of: gate and up, down, q and k and v, o
        assert len(calls) == 2 * 4
        model(IDS.repeat(4, 1))
        assert len(calls) == 2 * 4
