"""A patched model under ``torch.compile``: whole graphs, with no more than eager's own rounding error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

import molora
from molora import routing
from molora.patch import compile_layers
from molora.trainer import checkpoint_activations
from molora_kernels.testing import assert_within_budget

IDS = torch.arange(24).view(2, 12) * 7 % 320
MASK = torch.ones_like(IDS)
MASK[1, 9:] = 0


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = molora.inject(LlamaForCausalLM(tiny_config), {"lora_r": 4, "init_b_std": 0.1, "lora_dropout": 0.2})
    yield model
    torch.compiler.reset()


def step(model) -> dict[str, torch.Tensor]:
    """Losses and every gradient of one training step."""
    torch.manual_seed(1)  # of the dropout
    model.zero_grad()
    record = routing.record(model, MASK)
    with routing.using(model, record):
        loss = model(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss
        losses = routing.combine(model, [record])
        loss.backward()
    adapters = [named for group in molora.parameter_groups(model).values() for named in group]
    gradients: dict[str, torch.Tensor] = {name: parameter.grad for name, parameter in adapters}
    return {"loss": loss.detach(), "z_loss": losses.z_loss, "load_balance": losses.load_balance} | gradients


@pytest.mark.parametrize("recompute", ["none", "non_reentrant", "reentrant"])
def test_a_training_step_is_whole_graphs_and_as_exact_as_eager(model, recompute):
    checkpoint_activations(model.train(), recompute)
    exact, eager = step(copy.deepcopy(model).double()), step(model)
    compile_layers(model, backend="aot_eager", fullgraph=True)
    compiled = step(model)
    assert compiled.keys() == eager.keys()
    for name in eager:
        assert_within_budget(compiled[name].detach(), eager[name].detach(), exact[name].detach(), name)


def test_layers_share_graphs_however_many_there_are(tiny_config):
    """Dynamo leaves to eager what comes after the eighth graph of a function; ``fullgraph`` makes that an error."""
    torch.compiler.reset()
    counters.clear()
    config = copy.deepcopy(tiny_config)
    config.num_hidden_layers = 12
    model = molora.inject(LlamaForCausalLM(config), {"lora_r": 4, "init_b_std": 0.1}).train()
    eager = step(model)
    compile_layers(model, backend="aot_eager", fullgraph=True)
    compiled = step(model)
    assert counters["stats"]["unique_graphs"] == 2  # the first layer's input needs no gradient
    assert compiled.keys() == eager.keys()
    for name in eager:
        assert torch.equal(compiled[name], eager[name]), name
    torch.compiler.reset()


def test_layers_of_more_than_eight_kinds_are_compiled(tiny_config):
    torch.compiler.reset()
    counters.clear()
    config = copy.deepcopy(tiny_config)
    config.num_hidden_layers = 10
    model = molora.inject(LlamaForCausalLM(config), {"lora_r": 4, "attn_lora": {"enabled": False}}).eval()
    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate_proj.scaling = 1.0 + i
    compile_layers(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        model(IDS, attention_mask=MASK, use_cache=False)
    assert counters["stats"]["unique_graphs"] == 10
    torch.compiler.reset()


def test_generation_equals_eager(model):
    model.eval()
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, attention_mask=torch.ones_like(IDS), **asked)
    compile_layers(model, backend="aot_eager")
    assert torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **asked), expected)
