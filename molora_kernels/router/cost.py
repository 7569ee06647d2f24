"""What the router costs, from its shapes alone: printed beside every measured time."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Least traffic with main memory and arithmetic of one call."""

    bytes: int
    """Each input read once and each output written once; what stays in caches between is free."""
    flops: int
    """Multiplications and additions of the matrix products, as the mathematics counts them: the three bf16 terms that
    make fp32 out of tensor cores are the kernel's affair."""


def bytes_and_flops(
    tokens: int,
    features: int,
    heads: int,
    experts: int,
    *,
    x_bytes: int = 2,
    backward: bool = False,
    need_dx: bool = True,
    need_drouter: bool = True,
) -> Cost:
    """Of the forward, or of the backward alone.

    Args:
        tokens, features, heads, experts: T, K, H, E of :func:`molora_kernels.router`.
        x_bytes: size of one element of x.
        backward: count the backward instead of the forward.
        need_dx, need_drouter: whether x, and whether weight and bias, get a gradient.

    >>> bytes_and_flops(8192, 3072, 1, 4)
    Cost(bytes=50642980, flops=201326592)
    """
    x, weight, logits, sums = tokens * features, heads * experts * features, tokens * heads * experts, heads
    columns = heads * experts
    if not backward:
        # x, weight -> gates, logits, sums, counts
        return Cost(x_bytes * x + 4 * (weight + 2 * logits + sums + 2 * columns), 2 * tokens * features * columns)
    # dgates, dsums, gates, logits -> dlogits, which the second kernel reads again
    traffic = 4 * (5 * logits + sums + columns)
    products = 0
    if need_dx:
        traffic += 4 * weight + x_bytes * x
        products += 1
    if need_drouter:
        traffic += x_bytes * x + 4 * (weight + columns)
        products += 1
    return Cost(traffic, products * 2 * tokens * features * columns)
