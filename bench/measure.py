"""Timing that can be trusted: variants in turn within one run, medians with spread, memory counted by tensor.

Absolute times on a shared machine mean little; every figure that is reported is a ratio between variants whose rounds
were interleaved (A B C A B C …), so that a drift of the machine's speed falls on all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Variant:
    """One way to do the work. ``forward`` maps x to y; ``leaves`` are what trains, besides x."""

    forward: Callable[[Tensor], Tensor]
    leaves: list[Tensor]


@dataclass
class Timing:
    """Milliseconds of each round."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def total(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


def interleaved(variants: Mapping[str, Variant], x: Tensor, dy: Tensor, rounds: int, warmup: int) -> dict[str, Timing]:
    """Forward and backward times of each variant, ``rounds`` times in turn, after ``warmup`` rounds that do not count.

    Each round uses fresh leaves' gradients; on CUDA the device is synchronised around each measured part and the L2
    cache is flushed before it.
    """
    timings = {name: Timing() for name in variants}
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=x.device) if x.is_cuda else None
    for round_ in tqdm(range(-warmup, rounds), desc="rounds", disable=None):
        for name, variant in variants.items():
            for leaf in variant.leaves:
                leaf.grad = None
            leaf_x = x.detach().requires_grad_()
            if flush is not None:
                flush.zero_()
            start = _now(x)
            y = variant.forward(leaf_x)
            middle = _now(x)
            if flush is not None:
                flush.zero_()
                middle_again = _now(x)
            else:
                middle_again = middle
            y.backward(dy)
            end = _now(x)
            if round_ >= 0:
                timings[name].forward.append(1e3 * (middle - start))
                timings[name].backward.append(1e3 * (end - middle_again))
    return timings


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def saved_mib(variant: Variant, x: Tensor, weights: Iterable[Tensor]) -> float:
    """MiB of tensors that the forward keeps for backward, each storage once, without parameters and frozen weights."""
    known = {t.untyped_storage().data_ptr() for t in (*variant.leaves, *weights)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = variant.forward(x.detach().requires_grad_())
    del y
    return sum(saved.values()) / 2**20


def median_ratio(ours: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio, round by round."""
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high
