from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from molora import distributed, guard, optim, phases
from molora.checkpoint import Progress
from molora.config import Group, Phase, Training
from molora.metrics import Interval, Measured, Meter

BALANCE = [0.25, 0.25, 0.25, 0.25]


@dataclass
class Watched:
    """A patched model whose gradients are set by hand, and its guard."""

    model: LlamaForCausalLM
    guard: guard.Guard
    progress: Progress

    def members(self) -> list[tuple[str, torch.nn.Parameter]]:
        groups = molora.parameter_groups(self.model).values()
        return [member for members in groups for member in members if member[1].requires_grad]

    def enter(self, *trainable: Group) -> None:
        phases.enter(self.model, Phase(step=0, trainable=list(trainable)))
        self.guard.enter_phase()

    def interval(
        self, losses: Sequence[float] = (1.0,), load: Sequence[float] = BALANCE, norms: Tensor | None = None
    ) -> Interval:
        meter, one, members = Meter(), torch.ones(()), self.members()
        for loss in losses:
            bad = loss != loss
            meter.add(
                Measured(
                    batch_losses=torch.tensor([loss / 2, loss / 2]),
                    z_loss=one,
                    load_balance=one,
                    grad_norm=one,
                    tensor_norms=torch.ones(len(members)) if norms is None else norms,
                    skipped=torch.tensor(bad),
                    load=torch.tensor([load] + [BALANCE] * 5),
                    tensors=[name for name, _ in members],
                    where=[["x:1"], ["x:2"]],
                    lr=0.1,
                    tokens=10,
                )
            )
        self.progress.step += len(losses)
        return meter.read(self.progress.step)

    def warnings(self, interval: Interval) -> list[tuple[int, str]]:
        return self.guard.judge(interval, self.progress).warnings


@pytest.fixture
def watched(tiny_config: LlamaConfig) -> Watched:
    model = molora.inject(LlamaForCausalLM(tiny_config), {"lora_r": 2})
    made = Watched(model, guard.Guard(model, max_skipped=3), Progress())
    made.enter("router", "lora", "attn_lora")
    return made


def touch(watched: Watched) -> None:
    """What an update does: every open tensor moves a little and has a gradient."""
    for _, parameter in watched.members():
        parameter.data.flatten()[0] += 1e-6
        parameter.grad = torch.ones_like(parameter)


def test_a_healthy_run_is_left_alone(watched: Watched) -> None:
    draw = random.Random(0)
    for i in range(60):
        touch(watched)
        assert watched.warnings(watched.interval([5 - 0.05 * i + draw.gauss(0, 0.2) for _ in range(5)])) == []


def test_a_spike_is_told_once(watched: Watched) -> None:
    touch(watched)
    draw = random.Random(0)
    watched.warnings(watched.interval([2 + draw.gauss(0, 0.05) for _ in range(30)]))
    told = watched.warnings(watched.interval([2.0, 2.3, 4.0, 4.1, 2.0]))
    assert [(step, text[:17]) for step, text in told] == [(33, "loss spike: 4.000")]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ([0.5, 0.3, 0.197, 0.003], "expert 3 of model.layers.0.mlp.gate_proj: under 1% of the tokens"),
        ([0.49, 0.49, 0.01, 0.01], None),  # 2 % of the tokens each, as every token has two experts
        ([0.498, 0.498, 0.002, 0.002], "nearly all tokens go to the same 2 of 4 experts"),
    ],
)
def test_a_router_that_collapses_is_told_when_it_lasts(
    watched: Watched, load: list[float], message: str | None
) -> None:
    told = []
    for _ in range(guard.LASTING - 1):
        touch(watched)
        told += watched.warnings(watched.interval(load=load))
    assert told == []
    watched.warnings(watched.interval())  # it recovers, so that counting starts again
    for _ in range(2 * guard.LASTING):
        touch(watched)
        told += watched.warnings(watched.interval(load=load))
    assert len(told) == (message is not None)
    assert all(message in text for _, text in told if message)


def test_an_expert_without_gradient_is_told_when_it_lasts(watched: Watched) -> None:
    told = []
    for _ in range(guard.LASTING):
        touch(watched)
        for name, parameter in watched.members():
            if name == "model.layers.1.mlp.up_proj.lora_b":
                assert parameter.grad is not None
                parameter.grad[:, 4:6] = 0  # expert 2 of rank 2
        told += watched.warnings(watched.interval())
    assert [text.partition(": ")[2] for _, text in told] == ["expert 2 of model.layers.1.mlp.up_proj: no gradient"]


def test_skipped_steps_name_tensor_and_rows(watched: Watched) -> None:
    norms = torch.ones(len(watched.members()))
    norms[3] = torch.inf
    interval = watched.interval([1.0], norms=norms)
    interval.columns[0]["skipped"] = 1.0
    name = watched.members()[3][0]
    [(step, text)] = watched.warnings(interval)
    assert (step, text) == (1, f"gradient of {name} is not finite; rows x:1, x:2; the step is skipped (1 so far)")


def test_so_many_in_a_row_stop_the_run_wherever_the_readings_are(watched: Watched) -> None:
    nan = float("nan")
    assert watched.guard.judge(watched.interval([nan, nan, 1.0, nan]), watched.progress).stop is None
    assert watched.guard.judge(watched.interval([nan]), watched.progress).stop is None
    stop = watched.guard.judge(watched.interval([nan, 1.0]), watched.progress).stop
    assert stop is not None
    assert "3 steps in a row, up to step 6" in stop
    assert watched.progress.skipped == 5


@pytest.mark.parametrize("grad", [None, 0.0])
def test_a_tensor_without_gradient_is_told_once(watched: Watched, grad: float | None) -> None:
    """In updates as they are: the tensor is cut off, the others train."""
    optimizer, _ = optim.build(watched.model, Training(lr=0.1))
    told = []
    for _ in range(3 * guard.PATIENCE):
        for name, parameter in watched.members():
            parameter.grad = torch.ones_like(parameter)
            if name == "model.layers.0.self_attn.q_proj.lora_a":
                parameter.grad = None if grad is None else torch.zeros_like(parameter)
        update = optim.update(optimizer, [p for _, p in watched.members()], torch.tensor(1.0), 1.0)
        told += watched.warnings(watched.interval(norms=update.tensor_norms))
    wanted = "trainable, but without a gradient in 10 steps: model.layers.0.self_attn.q_proj.lora_a"
    assert told == [(guard.PATIENCE, wanted)]


def test_a_tensor_that_does_not_move_is_told_once_a_phase(watched: Watched) -> None:
    told = []
    for phase in (("router",), ("router", "lora")):
        watched.enter(*phase)  # type: ignore[arg-type]
        for _ in range(2 * guard.PATIENCE):
            touch(watched)
            stuck = dict(watched.members())["model.layers.0.mlp.up_proj.router.bias"]
            stuck.data.flatten()[0] = 0.0
            told += [text for _, text in watched.warnings(watched.interval())]
    wanted = "trainable, but not moved in 10 steps: model.layers.0.mlp.up_proj.router.bias"
    assert told == [wanted, wanted]


def test_what_is_not_finite_is_found_in_a_model_that_is_spread(watched: Watched) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        distributed.shard(watched.model, distributed.World(), torch.device("cpu"))
        name, parameter = watched.members()[5]
        assert guard.not_finite(watched.model) is None
        distributed.local(parameter.detach())[0] = float("nan")
        assert guard.not_finite(watched.model) == name
    finally:
        dist.destroy_process_group()
