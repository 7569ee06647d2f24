from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from molora import phases
from molora.config import Phase

PHASES = [
    Phase(step=0, trainable=["router"]),
    Phase(step=3, trainable=["lora"]),
    Phase(step=4, trainable=["router", "attn_lora"]),
]


@pytest.mark.parametrize(("step", "expected"), [(0, 0), (2, 0), (3, 1), (4, 2), (99, 2)])
def test_the_phase_in_force(step: int, expected: int) -> None:
    assert phases.in_force(PHASES, step) == expected


def test_entering_opens_and_closes_groups(tiny_config: LlamaConfig) -> None:
    model = molora.inject(LlamaForCausalLM(tiny_config), {"lora_r": 2})
    groups = molora.parameter_groups(model)
    for phase in PHASES:
        for _, parameter in (member for members in groups.values() for member in members):
            parameter.grad = torch.ones_like(parameter)
        line = phases.enter(model, phase)
        assert "\n" not in line
        trains, _, frozen = line.partition(" | frozen: ")
        for group, members in groups.items():
            opened = group in phase.trainable
            assert {parameter.requires_grad for _, parameter in members} == {opened}
            assert {parameter.grad is not None for _, parameter in members} == {opened}
            elements = sum(parameter.numel() for _, parameter in members)
            assert f" {group} {len(members)} tensors {elements:,} elements" in " " + (trains if opened else frozen)
    adapters = {id(parameter) for members in groups.values() for _, parameter in members}
    assert not any(parameter.requires_grad for parameter in model.parameters() if id(parameter) not in adapters)
