"""How much of a problem one program works on. Selectors are pure functions of shape, dtype and compute capability;
each op keeps its own beside its kernels, and ``python -m bench compile`` compiles whatever they can return."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

Capability = tuple[int, int] | None
"""CUDA compute capability, (9, 0) for H100; None for anything else (AMD, the interpreter, a GPU yet unknown)."""

SHARED_MEMORY_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""What one program may use (CUDA C++ programming guide, technical specifications per compute capability)."""
PLANES = 4
"""Columns of a 16-bit product for each of an fp32 operand (``total.Kind``): three planes, and one of nothing, since a
product has a power of two of them."""
SMALLEST_SHARED_MEMORY_KIB = 64
"""What is assumed of a GPU that is not in the table: the LDS of an AMD compute unit."""


@dataclass(frozen=True)
class Tiles:
    """One program's share: rows of tokens, columns of input features, columns of output; and how it is run."""

    block_t: int
    block_k: int
    block_n: int = 0
    num_warps: int = 4
    num_stages: int = 3


def shared_memory_kib(capability: Capability) -> int:
    if capability is None:
        return SMALLEST_SHARED_MEMORY_KIB
    return SHARED_MEMORY_KIB.get(capability, 99 if capability[0] >= 8 else SMALLEST_SHARED_MEMORY_KIB)


def capability_of(device: torch.device) -> Capability:
    """Asked when a kernel is launched, never at import."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _cuda_capability(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors' own. Where it is, nothing is switched:
    a step launches hundreds of kernels, and the host is to stay ahead of them."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def cdiv(a: int, b: int) -> int:
    """As ``triton.cdiv``, which unwraps and checks its arguments as constants of a kernel at every call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
