"""Memory in which the portable backend computes on a CPU, kept from call to call.

Memory fresh from the operating system costs a page fault for every 4 KiB: on the machine of docs/log.md a pass that
writes it takes five times as long as one that writes memory used before, and the allocator gives large tensors back
between calls. So what lives only within a call is placed in one buffer, which grows to the largest call's need and
stays.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGNMENT = 64


class _Workspace(threading.local):
    """A stack of matrices; one for each thread, since backward may run in another."""

    memory = torch.empty(0, dtype=torch.uint8, device="cpu")
    used = 0
    wanted = 0


_own = _Workspace()


@contextmanager
def scope() -> Iterator[None]:
    """What :func:`empty` gives inside may be overwritten once this is left: it must not be returned or saved."""
    start = _own.used
    try:
        yield
    finally:
        _own.used = start
        if start == 0 and _own.wanted > len(_own.memory):
            with torch.inference_mode(False):  # or ordinary calls could not write to it
                _own.memory = torch.empty(_own.wanted, dtype=torch.uint8, device="cpu")


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A matrix of any content on the device of ``like``, and of its dtype if none is given, until the present
    :func:`scope` is left."""
    dtype = dtype or like.dtype
    if like.device.type != "cpu":  # CUDA's allocator keeps memory by itself
        return like.new_empty(shape, dtype=dtype)
    start, size = _own.used, torch.Size(shape).numel() * dtype.itemsize
    _own.used += -(-size // _ALIGNMENT) * _ALIGNMENT
    _own.wanted = max(_own.wanted, _own.used)
    if _own.used > len(_own.memory):
        # This once: there will be room when all that is in use has been given back.
        return like.new_empty(shape, dtype=dtype)
    return _own.memory[start : start + size].view(dtype).view(shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself, or a copy in this dtype until the present :func:`scope` is left."""
    return x if x.dtype == dtype else empty(x, *x.shape, dtype=dtype).copy_(x)


def release() -> None:
    """Give this thread's memory back to the system; the next call takes it anew."""
    _own.memory, _own.wanted = torch.empty(0, dtype=torch.uint8, device="cpu"), 0
