"""Which implementation runs: Triton kernels, portable PyTorch, or the reference that defines both.

- ``triton``: the kernels; CUDA devices (or, with ``TRITON_INTERPRET=1``, the interpreter on any device).
- ``torch``: plain PyTorch with a hand-written backward; any device.
- ``inductor``: the same with C++ kernels for experts, routers and SwiGLU, and what lies between other matrix products
  compiled too, all at first use; CPUs with a compiler.
- ``reference``: the specification, eager and differentiated by autograd; any device, any dtype up to fp64. Slow.
- ``auto``: ``triton`` for CUDA tensors when Triton is installed, ``inductor`` for CPU tensors when a C++ compiler is,
  else ``torch``.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from molora_kernels.cpu import has_amx, has_bf16_pairs

Backend = Literal["auto", "triton", "torch", "inductor", "reference"]
Resolved = Literal["triton", "torch", "inductor", "reference"]

_log = logging.getLogger("molora_kernels")
_choice: Backend = "auto"


class use_backend:
    """Choose the backend for all calls from here on, or for a ``with`` block.

    >>> with use_backend("reference"):
    ...     backend_for(torch.device("cpu"))
    'reference'

    Raises ``ValueError`` for an unknown name and ``RuntimeError`` if Triton is chosen but not installed, or inductor
    where there is no C++ compiler.
    """

    def __init__(self, name: Backend) -> None:
        global _choice
        if name not in get_args(Backend):
            raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(get_args(Backend))}")
        if name == "triton" and not _triton_installed():
            raise RuntimeError("backend 'triton' needs the package triton: pip install triton, or choose 'torch'")
        if name == "inductor" and not compiler_installed():
            raise RuntimeError(
                f"backend 'inductor' needs a C++ compiler: no {_compiler()} on the PATH; install it, name another in "
                "the environment variable CXX, or choose 'torch'"
            )
        self._name: Backend = name
        self._previous: Backend = _choice
        _choice = name

    def __enter__(self) -> use_backend:
        global _choice
        _choice = self._name
        return self

    def __exit__(self, *_: object) -> None:
        global _choice
        _choice = self._previous


def reference_chosen() -> bool:
    """Whether calls run the reference, outside the operators. Without side effects, so that torch.compile traces it."""
    return _choice == "reference"


def backend_for(device: torch.device) -> Resolved:
    """The backend that a tensor on ``device`` runs on under the present choice.

    Raises RuntimeError if Triton or inductor was chosen and has no way to run on ``device``.
    """
    if _choice == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend 'triton' was chosen, but tensors are on {device.type}: move them to a CUDA device, or choose "
            "'auto' or 'torch'; set TRITON_INTERPRET=1 before the start to run the kernels in Triton's interpreter"
        )
    if _choice == "inductor" and device.type != "cpu":
        raise RuntimeError(
            f"backend 'inductor' is for CPUs, but tensors are on {device.type}: choose 'auto' or 'torch'"
        )
    if _choice != "auto":
        return _choice
    chosen, why = _auto(device.type)
    _say_once(device.type, chosen, why)
    return chosen


def compiles(device_type: str) -> bool:
    """Whether the present choice means inductor there. Says nothing and raises nothing."""
    return device_type == "cpu" and (
        _choice == "inductor" or (_choice == "auto" and _compiles and compiler_installed())
    )


compiles._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess] # as in molora_kernels.cpu


def decided_by(device: torch.device) -> dict[str, Any]:
    """What decides, beside shapes, dtypes and the form chosen, which kernels and tiles run on ``device``, by name.
    Processes that train one model together must agree in it. Raises as :func:`backend_for`."""
    found: dict[str, Any] = {"device": device.type, "backend": backend_for(device)}
    if device.type == "cuda":
        found["capability"] = torch.cuda.get_device_capability(device)
    if device.type == "cpu":
        vectors = torch.backends.cpu.get_cpu_capability()
        found |= {"vectors": vectors, "AMX": has_amx(), "AVX512-BF16": has_bf16_pairs()}
    return found | {"TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET")}


def require_one_device(who: str, x: Tensor, others: Iterable[Tensor | None]) -> None:
    """Raise ValueError, in the name of ``who``, for a tensor that is elsewhere than x: kernels go by addresses."""
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(
                f"{who}: x is on {x.device} and another tensor, {tuple(other.shape)} {other.dtype}, on {other.device}; "
                "expected one device"
            )


def without_compiler(error: Exception) -> None:
    """Compiling failed: go on in plain PyTorch and say so, once, unless compiling was asked for, or other processes
    compute the same step: they may have compiled, and would round otherwise."""
    global _compiles
    if _choice == "inductor":
        raise error
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"backend auto: compiling failed in process {dist.get_rank()}, and {dist.get_world_size()} processes must "
            f"compute alike: mend the C++ compiler, {_compiler()}, that the error above is of (the environment "
            "variable CXX names another), or choose backend 'torch' (kernels.backend=torch) in all of them"
        ) from error
    _compiles = False
    _log.warning("backend auto: compiling failed, so from here on it is 'torch' on cpu: %s", error)


_compiles = True
"""Until it was seen to fail."""


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _tensor_cores() -> bool:
    """Whether the GPU has those that Triton uses, for bf16 too; of a GPU that is not there nothing is said."""
    return not torch.cuda.is_available() or torch.cuda.get_device_properties().major >= 8


def _compiler() -> str:
    """The C++ compiler that inductor calls."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@functools.cache
def compiler_installed() -> bool:
    return shutil.which(_compiler()) is not None


def _auto(device_type: str) -> tuple[Resolved, str]:
    if device_type == "cpu" and _compiles and compiler_installed():
        return "inductor", f"tensors are on cpu and there is a C++ compiler, {_compiler()}"
    if device_type != "cuda":
        return "torch", f"tensors are on {device_type}"
    if not _triton_installed():
        return "torch", "triton is not installed"
    if not _tensor_cores():
        return "torch", "the kernels are for GPUs of compute capability 8.0 and more"
    return "triton", "tensors are on cuda and triton is installed"


@functools.cache
def _say_once(device_type: str, chosen: Resolved, why: str) -> None:
    _log.info("backend auto -> %s for %s: %s", chosen, device_type, why)
