"""Kernels in C++, each file beside the module that calls it: with ``one_pass.py`` the ``inductor`` backend's own part.

They are compiled as torch.compile compiles its own loops, at the first call, in a few seconds, and kept where it keeps
them (TORCHINDUCTOR_CACHE_DIR).
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from molora_kernels import backend

Functions = dict[str, Callable[..., Any]]

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Of rows, and what the names of functions for them end with."""

_KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "b": ctypes.c_bool, "i": ctypes.c_int}
"""Arguments: an address (:func:`address`), a number, a flag, threads."""


def functions(source: Path, signatures: Iterable[tuple[str, str]]) -> Functions:
    """Of a file, those functions that are named, each with the kinds of its arguments; they return nothing. What the
    file includes of ours is compiled as its own text, by which compiled files are known."""
    from torch._inductor.codecache import CppCodeCache  # takes a second, so not before it is needed
    from torch._inductor.cpp_builder import is_gcc

    text = re.sub(
        r'#include "(.*)"', lambda name: (source.parent / name[1]).read_text("utf-8"), source.read_text("utf-8")
    )
    # Where inductor tells GCC not to. On macOS it does not, and takes any clang but Apple's for GCC.
    vectorize = ["-ftree-loop-vectorize"] if is_gcc() and sys.platform != "darwin" else []
    library = CppCodeCache.load(text, extra_flags=("-ffp-contract=fast", *vectorize))
    found: Functions = {}
    for name, kinds in signatures:
        function = getattr(library, name)
        function.argtypes, function.restype = [_KINDS[kind] for kind in kinds], None
        found[name] = _seen_by_profilers(f"molora.{name}", function)
    return found


def _seen_by_profilers(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if not profiler._is_profiler_enabled:
            return function(*arguments)
        with profiler.record_function(name):
            return function(*arguments)

    return call


def compiled(device: torch.device, load: Callable[[], Functions]) -> bool:
    """Whether tensors on ``device`` go to what ``load`` gives, under the present choice of backend. Compiles it; if
    that fails, says so as the passes do."""
    if backend.backend_for(device) != "inductor":
        return False
    try:
        load()
    except Exception as error:  # a compiler may fail in any way
        backend.without_compiler(error)
        return False
    return True


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def addresses(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p] | None:
    """One after another, in memory that is to be held until the call returns; None if there are none."""
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors)) if tensors else None
