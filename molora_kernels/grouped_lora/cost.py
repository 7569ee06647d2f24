"""FLOPs and bytes of grouped LoRA from its shapes: what a benchmark prints beside a time.

Bytes count each tensor once per kernel that reads or writes it; what stays in the L2 between kernels is not
subtracted, so a kernel can be a little faster than its bytes allow. With ``top_k`` both are those of the grouped form's
kernels: by set where a product has a row of output for each token, by expert where it sums over tokens (ADR 4). FLOPs
are the least: where all tokens of a tile chose the same set.
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


def forward(
    T: int,
    K: int,
    N: Sequence[int],
    P: int,
    *,
    heads: int = 0,
    experts: int = 1,
    itemsize: int = 2,
    top_k: int | None = None,
) -> Cost:
    """For T tokens, K input features, outputs N, ``itemsize`` bytes an element and P = G * R columns, the rank of all
    experts of all projections. ``top_k``: of the grouped form; None: of the dense one."""
    G, outputs, R = len(N), sum(N), P // len(N)
    C = P if top_k is None else P // experts * top_k
    shrink = itemsize * ((1 if top_k is None else G) * T * K + P * K + T * C)
    gate = itemsize * 2 * T * C + 4 * T * heads * (experts if top_k is None else top_k) if heads else 0
    expand = itemsize * (T * C + R * outputs + 2 * T * outputs)  # y is written, then read by the base projection
    return Cost(
        base_flops=2 * T * K * outputs,
        adapter_flops=2 * T * C * K + 2 * T * C // G * outputs,
        base_bytes=itemsize * (G * T * K + K * outputs + T * outputs),
        adapter_bytes=shrink + gate + expand + _sorting(T, G, heads, experts, top_k),
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
    top_k: int | None = None,
    need_dx: bool = True,
    need_dlora: bool = True,
) -> Cost:
    """As :func:`forward`; partial sums of the weight gradients are not counted (a few MB at any size)."""
    G, outputs, R = len(N), sum(N), P // len(N)
    C = P if top_k is None else P // experts * top_k
    # Rows of x and dy that the weight gradients read; rows of dx that are written, or read to be added to.
    x_rows, dy_rows, dx_rows = (1, 1, 2) if top_k is None else (G * top_k, top_k, 2 * G)
    unexpand = itemsize * (T * outputs + R * outputs + T * C)
    gate = 0  # without gates the scaling is in the products
    if heads:
        gate = itemsize * (2 + need_dlora + (need_dx or need_dlora)) * T * C
        gate += 8 * T * heads * (experts if top_k is None else top_k)
    weights = itemsize * (x_rows * T * K + dy_rows * T * outputs + 2 * T * C) + 4 * (P * K + R * outputs)
    inputs = itemsize * (T * C + P * K + dx_rows * T * K)
    shrink_flops, expand_flops = 2 * T * C * K, 2 * T * C // G * outputs
    return Cost(
        base_flops=2 * T * K * outputs if need_dx else 0,
        adapter_flops=expand_flops + need_dx * shrink_flops + need_dlora * (shrink_flops + expand_flops),
        base_bytes=itemsize * (T * outputs + K * outputs + (2 * G - 1) * T * K) if need_dx else 0,
        adapter_bytes=unexpand + gate + need_dlora * weights + need_dx * inputs
        + _sorting(T, G, heads, experts, top_k, launches=1 + need_dx, sums=2 * need_dlora),
    )  # fmt: skip


def _sorting(T: int, G: int, heads: int, experts: int, top_k: int | None, launches: int = 2, sums: int = 0) -> int:
    """Bytes that say who chose what, none in the dense form: indices of 8 bytes, slots of one. ``launches`` by set and
    ``sums`` by expert are those of one projection."""
    if top_k is None:
        return 0
    # gates -> experts, slots and set; the sets and their order; the lists of the tiles; gates of the chosen alone
    once = 4 * experts + (8 * top_k + experts + 8) + (8 + 8 + 8) + (8 + experts) + (8 + 4 + 4) * top_k
    by_set = 8 + experts
    once += (8 + 8 + 8) * top_k if sums else 0  # the pairs of token and slot are sorted for all sums
    return T * (heads * once + G * (launches * by_set + sums * 8 * top_k))
