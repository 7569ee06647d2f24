"""Rounds read new tokens, and the clock of a GPU measures the GPU."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from bench.measure import Variant, _DeviceClock, interleaved, out_of_memory, saved_mib


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


def test_a_variant_without_memory_is_told_apart() -> None:
    leaf = torch.zeros(3, requires_grad=True)

    def too_large(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.\nMore of it")

    x, upstream = torch.ones(3), torch.tensor([1.0, -2.0, 0.5])
    fits = Variant(lambda x: x * leaf, [leaf])
    assert out_of_memory(fits, x, upstream) == "" and leaf.grad is None
    assert out_of_memory(Variant(too_large, []), x, upstream).endswith("128.00 MiB.")


def test_counting_what_is_saved_keeps_nothing() -> None:
    """Hooks that give a tensor back as it is make a cycle that no collector breaks."""
    leaf, x = torch.ones((), requires_grad=True), torch.ones(3, 5, 7)
    assert saved_mib(Variant(lambda x: (x * leaf).exp(), [leaf]), x, []) > 0  # exp saves its own result
    gc.collect()
    assert sum(type(t) is torch.Tensor and t.shape == x.shape for t in gc.get_objects()) == 1
