"""What compute-sanitizer looks for on a GPU, looked for in Triton's interpreter.

Of every launch it knows each element that each program reads and writes, so it finds

- what lies outside of all tensors that the kernel was given: between the rows of a view too,
- what two programs write, or one writes and another reads: nothing orders programs,
- what one program reads after it has written it, with no barrier between: nothing orders its threads,
- different values that one store puts in one place.

Not seen: an address within a tensor that the kernel was given, and that is the wrong one; and what the compiler does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

UNWATCHED = (
    "create_atomic_rmw",
    "create_atomic_cas",
    "create_descriptor_load",
    "create_descriptor_store",
    "create_descriptor_gather",
    "create_descriptor_scatter",
)


class Fault(AssertionError):
    """A launch touched what it must not; says which kernel, and where in which tensor."""


@contextmanager
def watching() -> Iterator[list[str]]:
    """Raise :class:`Fault` at the first launch with a fault. Gives the names of the kernels as they are launched."""
    launches: list[_Launch] = []
    names: list[str] = []
    call, builder = GridExecutor.__call__, InterpreterBuilder
    load, store, wait = builder.create_masked_load, builder.create_masked_store, builder.create_barrier

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(_Launch(self.fn.__name__, [*args, *kwargs.values()]))
        names.append(self.fn.__name__)
        try:
            call(self, *args, **kwargs)
            launches[-1].judge()
        except InterpreterError as error:  # in which the interpreter wraps whatever a kernel raises
            if isinstance(error.__cause__, Fault):
                raise error.__cause__ from None
            raise
        finally:
            launches.pop()

    def watched_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].read(self, *_chosen(ptrs, mask))
        return load(self, ptrs, mask, *rest)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].write(self, *_chosen(ptrs, mask, value))
        return store(self, ptrs, value, mask, *rest)

    def watched_barrier(self: Any) -> None:
        launches[-1].barrier()
        wait(self)

    def refuse(*_: Any) -> Any:  # rather than let a kernel that has them pass unwatched
        raise NotImplementedError("the sanitizer does not watch atomics and descriptors")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", watched_call)
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(builder, "create_barrier", watched_barrier)
        for name in UNWATCHED:
            patch.setattr(builder, name, refuse, raising=False)
        yield names


def _chosen(ptrs: Any, mask: Any, value: Any = None) -> tuple[np.ndarray, ...]:
    """Addresses where the mask is true, and the values that go there."""
    on = np.broadcast_to(mask.data, ptrs.data.shape)
    addresses = ptrs.data[on].astype(np.int64)
    return (addresses,) if value is None else (addresses, np.broadcast_to(value.data, ptrs.data.shape)[on])


class _Launch:
    def __init__(self, kernel: str, arguments: list[Any]) -> None:
        self.kernel = kernel
        self.tensors = list(_tensors(arguments))
        self.elements = np.unique(np.concatenate([np.empty(0, np.int64), *map(_addresses, self.tensors)]))
        self.reads: list[tuple[int, np.ndarray]] = []
        self.writes: list[tuple[int, np.ndarray]] = []
        self.fresh: list[np.ndarray] = []
        """What the present program has written since its last barrier."""
        self.program = -1

    def read(self, builder: Any, addresses: np.ndarray) -> None:
        self._enter(builder)
        self._check_inside(addresses, "reads")
        for written in self.fresh:
            if len(both := np.intersect1d(addresses, written)):
                self._fail("reads what it has written, with no barrier between:", both[0])
        self.reads.append((self.program, np.unique(addresses)))

    def write(self, builder: Any, addresses: np.ndarray, values: np.ndarray) -> None:
        self._enter(builder)
        self._check_inside(addresses, "writes")
        unique, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        same = values[first][inverse.reshape(-1)] == values
        different = ~(same | (values != values))  # NaN beside NaN is the same
        if different.any():
            self._fail("puts different values in one place:", addresses[different][0])
        self.fresh.append(unique)
        self.writes.append((self.program, unique))

    def barrier(self) -> None:
        self.fresh.clear()

    def judge(self) -> None:
        """What programs do to one another."""
        written, writer = _flat(self.writes)
        order = np.argsort(written, kind="stable")
        written, writer = written[order], writer[order]
        twice = (written[1:] == written[:-1]) & (writer[1:] != writer[:-1])
        if twice.any():
            at = int(np.argmax(twice))
            self._fail(f"is written by programs {writer[at]} and {writer[at + 1]}:", written[at])
        read, reader = _flat(self.reads)
        at = np.searchsorted(written, read)
        found = at < len(written)
        found[found] = written[at[found]] == read[found]
        others = found.copy()
        others[found] = writer[at[found]] != reader[found]
        if others.any():
            i = int(np.argmax(others))
            self._fail(f"is written by program {writer[at[i]]} and read by program {reader[i]}:", read[i])

    def _enter(self, builder: Any) -> None:
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        program = (x * height + y) * depth + z
        if program != self.program:
            self.program = program
            self.fresh.clear()

    def _check_inside(self, addresses: np.ndarray, does: str) -> None:
        at = np.minimum(np.searchsorted(self.elements, addresses), len(self.elements) - 1)
        if len(addresses) and (not len(self.elements) or (outside := self.elements[at] != addresses).any()):
            self._fail(f"{does} outside of its tensors:", addresses[outside][0] if len(self.elements) else addresses[0])

    def _fail(self, what: str, address: int) -> None:
        nearest = min(self.tensors, key=lambda t: abs(int(address) - t.data_ptr()), default=None)
        where = "no tensor"
        if nearest is not None:
            away = (int(address) - nearest.data_ptr()) / nearest.itemsize
            what_it_is = f"{tuple(nearest.shape)}, strides {nearest.stride()}, {nearest.dtype}"
            where = f"{away:+g} elements from the start of {what_it_is}"
        raise Fault(f"{self.kernel}, program {self.program}: {what} {where}")


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple | list):
            yield from _tensors(argument)


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    """Of every element."""
    offsets = np.zeros((), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.add.outer(offsets, np.arange(size, dtype=np.int64) * stride)
    return (tensor.data_ptr() + offsets * tensor.itemsize).ravel()


def _flat(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses, and the program of each; each pair once."""
    if not accesses:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    addresses = np.concatenate([a for _, a in accesses])
    programs = np.repeat([program for program, _ in accesses], [len(a) for _, a in accesses])
    pairs = np.unique(np.stack([addresses, programs]), axis=1)
    return pairs[0], pairs[1]
