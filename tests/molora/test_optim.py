from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from molora import optim
from molora.config import Training


@pytest.fixture
def model(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    return molora.inject(LlamaForCausalLM(tiny_config), {"lora_r": 2})


def test_every_adapter_parameter_is_in_once_and_vectors_do_not_decay(model: LlamaForCausalLM) -> None:
    optimizer, _ = optim.build(model, Training(weight_decay=0.1))
    found = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    adapters = [parameter for members in molora.parameter_groups(model).values() for _, parameter in members]
    assert sorted(found) == sorted(map(id, adapters))
    assert all(parameter.dtype == torch.float32 for parameter in adapters)
    for group in optimizer.param_groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules_warm_up_and_decay(model: LlamaForCausalLM, scheduler: str, expected: list[float]) -> None:
    settings = Training.model_validate({"lr": 1.0, "lr_scheduler": scheduler, "warmup_steps": 2, "max_train_steps": 6})
    optimizer, schedule = optim.build(model, settings)
    rates = []
    for _ in expected:
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-4)


def test_small_updates_are_not_lost(model: LlamaForCausalLM) -> None:
    """At lr 1.5e-5 every element moves at each of 100 steps; bf16 masters would leave more than half where they are."""
    optimizer, _ = optim.build(model, Training(lr=1.5e-5))
    adapters = [parameter for members in molora.parameter_groups(model).values() for _, parameter in members]
    start = [parameter.detach().clone() for parameter in adapters]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        for parameter in adapters:
            parameter.grad = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    for before, parameter in zip(start, adapters, strict=True):
        assert torch.all((before - parameter - 100 * 1.5e-5).abs() < 0.05 * 100 * 1.5e-5)
