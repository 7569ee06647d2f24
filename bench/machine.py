"""The two rates that bound everything, as this machine reaches them now: the roofline."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from bench.measure import MIB


@dataclass(frozen=True)
class Roofline:
    gbyte_per_s: float
    """Of a copy, read and written bytes together."""
    gflop_per_s: float
    """Of one large product of two matrices in the dtype that is measured."""

    def ms(self, flops: float, bytes_: float) -> float:
        """Least time for so much arithmetic and traffic, if they overlap perfectly."""
        return 1e-6 * max(flops / self.gflop_per_s, bytes_ / self.gbyte_per_s)


def roofline(device: torch.device, dtype: torch.dtype, repeats: int) -> Roofline:
    """The fastest of several repeats with large operands: a copy of 256 MiB, and square matrices of 2048 (8192 on
    CUDA)."""
    size = 8192 if device.type == "cuda" else 2048
    source = torch.zeros(256 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copying, multiplying = [], []
    for round_ in range(-1, repeats):
        start = _now(device)
        target.copy_(source)
        middle = _now(device)
        torch.mm(a, b)
        if round_ >= 0:
            copying.append(middle - start)
            multiplying.append(_now(device) - middle)
    return Roofline(
        gbyte_per_s=round(2e-9 * source.numel() / min(copying), 2),
        gflop_per_s=round(2e-9 * size**3 / min(multiplying), 2),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
