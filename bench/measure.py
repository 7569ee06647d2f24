"""Timing that can be trusted: variants in turn within one run, medians with spread, memory counted by tensor.

Absolute times on a shared machine mean little; every figure that is reported is a ratio between variants whose rounds
were interleaved (A B C, B A C, …), so that a drift of the machine's speed falls on all alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

Outputs = Tensor | tuple[Tensor, ...]
"""What a forward gives: every tensor of it gets an upstream gradient."""

MIB = 2**20


def backward(outputs: Outputs, upstream: Outputs) -> None:
    """The backward of most variants."""
    torch.autograd.backward(as_tuple(outputs), as_tuple(upstream))


def as_tuple(tensors: Outputs) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tensors


@dataclass(frozen=True)
class Variant:
    """One way to do the work."""

    forward: Callable[[Tensor], Any]
    leaves: Sequence[Tensor]
    """What trains, besides x."""
    named: Callable[[list[Tensor]], dict[str, list[Tensor]]] = lambda gradients: {"leaves": gradients}
    """Gradients of the leaves by kind, in a layout that all variants of one mathematics share: for the check."""
    backward: Callable[[Any, Outputs], None] = backward
    update: Callable[[], None] | None = None
    """What a training step does after backward; timed apart."""


@dataclass
class Timing:
    """Milliseconds of each round."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    """Until forward and backward were queued; on a CPU, until they were done."""

    @property
    def total(self) -> list[float]:
        """Forward and backward."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


def interleaved(
    variants: Mapping[str, Variant], x: Tensor, upstream: Outputs, rounds: int, warmup: int
) -> dict[str, Timing]:
    """Times of each variant's parts, ``rounds`` times in turn, after ``warmup`` rounds that do not count.

    Each round has an order of its own, so that what a variant leaves in caches and in the allocator falls on all alike,
    and starts without gradients. Each is given new tokens, as a step of training is: a library that compiles for the
    number of rows an expert gets (oneDNN) has then to do so as it would there. (``step`` and ``expand`` do not read
    them: their variants have inputs of their own, the same in all rounds.) On CUDA the parts are measured on the
    device, by events; before each of them the L2 cache is flushed, and the device is kept busy while the part is being
    queued.
    """
    timings = {name: Timing() for name in variants}
    clock = _DeviceClock(x.device) if x.is_cuda else _Clock()
    shuffled = random.Random(0)
    draw = torch.Generator(x.device).manual_seed(0)
    x = x.clone()
    largest = None if x.is_floating_point() else int(x.max())
    for round_ in tqdm(range(-warmup, rounds), desc="rounds", disable=None):
        x.normal_(generator=draw) if largest is None else x.random_(largest + 1, generator=draw)
        for name, variant in shuffled.sample(list(variants.items()), len(variants)):
            for leaf in variant.leaves:
                leaf.grad = None
            leaf_x = input_leaf(x)
            y, forward_ms, queued = clock.time(lambda variant=variant, leaf_x=leaf_x: variant.forward(leaf_x))
            _, backward_ms, more = clock.time(lambda variant=variant, y=y: variant.backward(y, upstream))
            update_ms = clock.time(variant.update)[1] if variant.update else 0.0
            del y
            if round_ >= 0:
                timings[name].forward.append(forward_ms)
                timings[name].backward.append(backward_ms)
                timings[name].update.append(update_ms)
                timings[name].host.append(queued + more)
    return timings


def input_leaf(x: Tensor) -> Tensor:
    """x as a variant's input: with a gradient, unless it holds indices."""
    return x.detach().requires_grad_(x.is_floating_point())


class _Clock:
    def time(self, work: Callable[[], Any]) -> tuple[Any, float, float]:
        """What the work gives, milliseconds that it took, and milliseconds of the host."""
        start = time.perf_counter()
        result = work()
        taken = 1e3 * (time.perf_counter() - start)
        return result, taken, taken


AHEAD_CYCLES = 20_000_000
"""How long a device waits before a part that is timed: about 10 ms at 2 GHz, a few times what it takes to queue a block
with experts. So the part's kernels follow one another as they do in training, where the host runs ahead, and no launch
is measured in place of a kernel that is shorter. What asks the device something, or takes longer to queue (``host_ms``
says how long; a whole model does), still has its launches in its time, as it has in training."""


class _DeviceClock:
    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(256 * MIB, dtype=torch.uint8, device=device)

    def time(self, work: Callable[[], Any]) -> tuple[Any, float, float]:
        self._flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)  # one idle thread; the flush alone is over in a tenth of a millisecond
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.perf_counter()
        result = work()
        queued = 1e3 * (time.perf_counter() - began)
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end), queued


def saved_mib(variant: Variant, x: Tensor, weights: Iterable[Tensor]) -> float:
    """MiB of tensors that the forward keeps for backward, each storage once, without parameters and frozen weights."""
    known = {t.untyped_storage().data_ptr() for t in (*variant.leaves, *weights)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the node that holds it, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = variant.forward(input_leaf(x))
    del y
    return sum(saved.values()) / MIB


def peak_mib(variant: Variant, x: Tensor, upstream: Outputs) -> float | None:
    """Most MiB that a round holds on a CUDA device beyond what was there before it; None on a CPU."""
    if not x.is_cuda:
        return None
    for leaf in variant.leaves:
        leaf.grad = None
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    variant.backward(variant.forward(input_leaf(x)), upstream)
    if variant.update:
        variant.update()
    return (torch.cuda.max_memory_allocated(x.device) - before) / MIB


def spent(variant: Variant, x: Tensor, upstream: Outputs, most: int = 4) -> dict[str, float]:
    """Share of a forward and backward's own time by PyTorch operator (on CUDA: by kernel), the largest ``most``."""
    activity = torch.profiler.ProfilerActivity.CUDA if x.is_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        variant.backward(variant.forward(input_leaf(x)), upstream)
    taken = {e.key: e.self_device_time_total if x.is_cuda else e.self_cpu_time_total for e in profile.key_averages()}
    whole = sum(taken.values())
    largest = sorted(taken, key=lambda key: -taken[key])[:most]
    return {key.removeprefix("aten::"): round(taken[key] / whole, 3) for key in largest} if whole else {}


def kernels(variant: Variant, x: Tensor, upstream: Outputs, most: int = 40) -> dict[str, Any]:
    """Of a forward and backward on CUDA: milliseconds of all kernels together, without what lies between them, and the
    ``most`` that took longest, with how often each ran. Gradients are made, not added to, as in a timed round."""
    for leaf in variant.leaves:
        leaf.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        variant.backward(variant.forward(input_leaf(x)), upstream)
        torch.cuda.synchronize(x.device)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {
        "kernels_ms": round(1e-3 * sum(event.self_device_time_total for event in events), 3),
        "kernels": {e.key[:120]: (e.count, round(1e-3 * e.self_device_time_total, 4)) for e in events[:most]},
    }


def out_of_memory(variant: Variant, x: Tensor, upstream: Outputs) -> str:
    """Runs a round; what the device says if it has no memory for one, else nothing."""
    try:
        variant.backward(variant.forward(input_leaf(x)), upstream)
    except torch.OutOfMemoryError as error:
        return str(error).splitlines()[0]
    finally:
        for leaf in variant.leaves:
            leaf.grad = None
    return ""


def median_ratio(ours: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio, round by round."""
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def rows(
    variants: Mapping[str, Variant],
    x: Tensor,
    upstream: Outputs,
    weights: Iterable[Tensor],
    *,
    base: str,
    rounds: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """One row of a result for each variant; ``ratio`` is over ``base``, forward and backward together."""
    weights = list(weights)
    timings = interleaved(variants, x, upstream, rounds, warmup)
    made = []
    for name, timing in timings.items():
        ratio, low, high = median_ratio(timing.total, timings[base].total)
        row = {
            "variant": name,
            "fwd_ms": round(statistics.median(timing.forward), 3),
            "bwd_ms": round(statistics.median(timing.backward), 3),
            "total_ms": round(statistics.median(timing.total), 3),
            "ratio": round(ratio, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "saved_mib": round(saved_mib(variants[name], x, weights), 1),
        }
        if variants[name].update:
            row["update_ms"] = round(statistics.median(timing.update), 3)
        if x.is_cuda:
            row["host_ms"] = round(statistics.median(timing.host), 3)
            row |= kernels(variants[name], x, upstream)
        peak = peak_mib(variants[name], x, upstream)
        made.append(row if peak is None else row | {"peak_mib": round(peak, 1)})
    return made
