"""FLOPs and bytes of grouped LoRA from its shapes: what a benchmark prints beside a time.

Bytes count each tensor once per kernel that reads or writes it; what stays in the L2 between kernels is not
subtracted, so a kernel can be a little faster than its bytes allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    base_flops: int
    """Of the frozen projections."""
    adapter_flops: int
    """Of the experts; the routers' and the gates' are not counted, they are below a percent of these."""
    base_bytes: int
    """Of the frozen projections, were they alone."""
    adapter_bytes: int
    """Of everything that the experts add, the second read of x and of the output included."""


def forward(T: int, K: int, N: Sequence[int], P: int, *, heads: int = 0, experts: int = 1, itemsize: int = 2) -> Cost:
    """For T tokens, K input features, outputs N, P = G * R columns of the shrink, ``itemsize`` bytes an element."""
    outputs, R = sum(N), P // len(N)
    gates = 4 * T * heads * experts
    shrink = itemsize * (T * K + P * K + T * P)
    gate = itemsize * 2 * T * P + gates
    expand = itemsize * (T * P + R * outputs + 2 * T * outputs)  # y is written, then read by the base projection
    return Cost(
        base_flops=2 * T * K * outputs,
        adapter_flops=2 * T * P * K + 2 * T * R * outputs,
        base_bytes=itemsize * (len(N) * T * K + K * outputs + T * outputs),
        adapter_bytes=shrink + gate + expand,
    )


def backward(
    T: int,
    K: int,
    N: Sequence[int],
    P: int,
    *,
    heads: int = 0,
    experts: int = 1,
    itemsize: int = 2,
    need_dx: bool = True,
    need_dlora: bool = True,
) -> Cost:
    """As :func:`forward`; partial sums of the weight gradients are not counted (a few MB at any size)."""
    outputs, R = sum(N), P // len(N)
    unexpand = itemsize * (T * outputs + R * outputs + T * P)
    gate = itemsize * (2 + need_dlora + (need_dx or need_dlora)) * T * P + 8 * T * heads * experts
    weights = itemsize * (T * K + T * outputs + 2 * T * P) + 4 * (P * K + R * outputs) if need_dlora else 0
    inputs = itemsize * (T * P + P * K + 2 * T * K) if need_dx else 0
    products = 2 * T * R * outputs + (2 * T * P * K if need_dx else 0)
    if need_dlora:
        products += 2 * T * P * K + 2 * T * R * outputs
    return Cost(
        base_flops=2 * T * K * outputs if need_dx else 0,
        adapter_flops=products,
        base_bytes=itemsize * (T * outputs + K * outputs + (2 * len(N) - 1) * T * K) if need_dx else 0,
        adapter_bytes=unexpand + gate + weights + inputs,
    )
