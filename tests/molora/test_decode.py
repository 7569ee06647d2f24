"""A few tokens without a gradient take their own path: the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

import molora
import molora_kernels
from molora import decode
from molora_kernels.few_tokens import portable
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


def both_ways(model, monkeypatch, ids=IDS) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        quick = model(ids).logits
        with monkeypatch.context() as patch:
            patch.setattr(decode, "MOST_TOKENS", 0)
            return quick, model(ids).logits


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


@pytest.mark.parametrize(
    ("placement", "dtype"), [("recipe", torch.bfloat16), *((name, torch.float32) for name in PLACEMENTS)], ids=str
)
def test_as_near_to_fp64_as_the_kernels_are(tiny_config, placement, dtype, monkeypatch):
    """In the dtypes that C++ serves."""
    quick, slow = both_ways(patched(tiny_config, PLACEMENTS[placement], dtype), monkeypatch)
    exact = patched(tiny_config, PLACEMENTS[placement], dtype).double()
    with torch.no_grad():
        exact = exact(IDS).logits
    assert (quick.double() - exact).norm() <= 2 * (slow.double() - exact).norm()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("small", [0, portable.SMALL])
def test_one_token_and_large_weights(tiny_config, tokens, small, monkeypatch):
    monkeypatch.setattr(portable, "SMALL", small)
    ids = IDS[:1, :tokens]
    quick, slow = both_ways(patched(tiny_config, PLACEMENTS["recipe"]), monkeypatch, ids)
    torch.testing.assert_close(quick, slow, rtol=1e-11, atol=1e-12)


def test_a_base_wider_than_the_masters_is_left_to_the_kernels(tiny_config, monkeypatch):
    model = patched(tiny_config, PLACEMENTS["recipe"])
    for group in molora.parameter_groups(model).values():
        for _, parameter in group:
            parameter.data = parameter.data.float()
    quick, slow = both_ways(model, monkeypatch)
    torch.testing.assert_close(quick, slow, rtol=1e-11, atol=1e-12)


def test_the_path_is_taken_without_gradient_alone(tiny_config, monkeypatch):
    model, calls = patched(tiny_config, PLACEMENTS["recipe"]), []
    call = molora_kernels.few_tokens
    monkeypatch.setattr(molora_kernels, "few_tokens", lambda *args, **more: calls.append(1) or call(*args, **more))
    model(IDS)
    assert not calls
    with torch.no_grad():
        model(IDS)
        # two layers of: gate and up, down, q and k and v, o
        assert len(calls) == 2 * 4
        model(IDS.repeat(decode.MOST_TOKENS // IDS.numel() + 1, 1))
        assert len(calls) == 2 * 4
