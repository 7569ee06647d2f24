"""Rounds read new tokens, and the clock of a GPU measures the GPU."""

from __future__ import annotations

import time

import pytest
import torch

from bench.measure import Variant, _DeviceClock, interleaved


@pytest.mark.gpu
def test_what_the_host_takes_to_launch_is_not_measured() -> None:
    x = torch.zeros(8, device="cuda")

    def slow_to_launch() -> None:
        for _ in range(5):
            time.sleep(0.001)
            x.add_(1)

    clock = _DeviceClock(x.device)
    clock.time(slow_to_launch)  # loads the kernels
    _, device_ms, host_ms = clock.time(slow_to_launch)
    assert host_ms > 5 > 1 > device_ms


@pytest.mark.parametrize("x", [torch.zeros(4, 3), torch.tensor([[0, 7, 3]])], ids=["features", "tokens"])
def test_each_round_has_new_tokens_the_same_for_all(x: torch.Tensor) -> None:
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": []}

    def variant(name: str) -> Variant:
        def forward(given: torch.Tensor) -> torch.Tensor:
            seen[name].append(given.detach().clone())
            return torch.zeros(())

        return Variant(forward, (), backward=lambda *_: None)

    before = x.clone()
    interleaved({name: variant(name) for name in seen}, x, torch.zeros(()), rounds=3, warmup=1)
    assert all(map(torch.equal, seen["a"], seen["b"])) and len(seen["a"]) == 4
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen["a"]}) == 4
    assert torch.equal(x, before) and max(tokens.max() for tokens in seen["a"]) <= 7
