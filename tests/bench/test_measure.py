"""The clock of a GPU measures the GPU."""

from __future__ import annotations

import time

import pytest
import torch

from bench.measure import _DeviceClock


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
