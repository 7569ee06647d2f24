"""Memory in which the portable backend computes on a CPU, kept from call to call.

Memory fresh from the operating system costs a page fault for every 4 KiB: on the machine of docs/log.md a pass that
writes it takes five times as long as one that writes memory used before, and the allocator gives large tensors back
between calls. So what lives only within a call is placed in one buffer, which grows to the largest call's need and
stays; and the memory of what is returned or saved is used again when nobody holds it any more.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import deque
from contextlib import ContextDecorator

import torch
from torch import Tensor

_ALIGNMENT = 64


class _Workspace(threading.local):
    """A stack of matrices; one for each thread, since backward may run in another."""

    def __init__(self) -> None:
        self.take(0)
        self.used = 0
        self.starts: list[int] = []
        """What was used when each scope that is not left yet was entered."""

    def take(self, size: int) -> None:
        with torch.inference_mode(False):  # or ordinary calls could not write to it
            self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.wanted = size
        self.of_dtype: dict[torch.dtype, Tensor] = {}

    def view(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """From this byte on. One operation: of a small matrix, what is done to it costs no more than a view of it."""
        if dtype not in self.of_dtype:
            with torch.inference_mode(False):
                self.of_dtype[dtype] = self.memory.view(dtype)
        return self.of_dtype[dtype].as_strided(shape, _strides(shape), start // dtype.itemsize)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


_own = _Workspace()


class scope(ContextDecorator):
    """What :func:`empty` gives inside may be overwritten once this is left: it must not be returned or saved."""

    def __enter__(self) -> None:
        _own.starts.append(_own.used)

    def __exit__(self, *_: object) -> None:
        start = _own.used = _own.starts.pop()
        if start == 0 and _own.wanted > len(_own.memory):
            _own.take(_own.wanted)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A matrix of any content on the device of ``like``, and of its dtype if none is given, until the present
    :func:`scope` is left."""
    dtype = dtype or like.dtype
    if like.device.type != "cpu":  # CUDA's allocator keeps memory by itself
        return like.new_empty(shape, dtype=dtype)
    start, size = _own.used, math.prod(shape) * dtype.itemsize
    _own.used += -(-size // _ALIGNMENT) * _ALIGNMENT
    _own.wanted = max(_own.wanted, _own.used)
    if _own.used > len(_own.memory):
        # This once: there will be room when all that is in use has been given back.
        return like.new_empty(shape, dtype=dtype)
    return _own.view(start, shape, dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself, or a copy in this dtype until the present :func:`scope` is left."""
    return x if x.dtype == dtype else empty(x, *x.shape, dtype=dtype).copy_(x)


def lasting(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """As :func:`empty`, to be returned or saved: its memory comes back when nobody holds the tensor or a view of it."""
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or size < _LARGE:
        return like.new_empty(shape, dtype=dtype)
    memory = _kept.take(size)
    # A tensor made from this holds it, and so does every view and every saved copy, until the last of them is gone.
    block = (ctypes.c_uint8 * size).from_address(memory.data_ptr())
    weakref.finalize(block, _kept.returned.append, memory).atexit = False
    return torch.frombuffer(block, dtype=dtype).resize_(shape)  # no view: autograd lets nobody change one in place


_LARGE = 1 << 20
"""Bytes from which the allocator takes memory from the system for each tensor anew."""


class _Kept:
    """Memory that was used before. All that is held, used or free, is at most a quarter more than was once in use
    together: by so much may a piece be larger than what is asked for."""

    def __init__(self) -> None:
        self.returned: deque[Tensor] = deque()
        """What a finalizer gives back, in any thread at any moment: an append needs no lock."""
        self.free: list[Tensor] = []
        self.used = self.most = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        with self._lock:
            self._collect()
            fitting = [m for m in self.free if size <= len(m) <= 1.25 * size]
            if fitting:
                memory = min(fitting, key=len)
                self.free = [m for m in self.free if m is not memory]
            else:
                while self.free and self.used + sum(map(len, self.free)) + size > self.most:
                    self.free.pop(0)
                with torch.inference_mode(False):
                    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            self.used += len(memory)
            self.most = max(self.most, self.used)
            return memory

    def clear(self) -> None:
        with self._lock:
            self._collect()
            self.free.clear()
            self.most = self.used

    def _collect(self) -> None:
        while self.returned:
            self.free.append(self.returned.popleft())
            self.used -= len(self.free[-1])


_kept = _Kept()


def release() -> None:
    """Give memory back to the system: this thread's, and all that is free. The next call takes it anew."""
    _kept.clear()
    _own.take(0)
