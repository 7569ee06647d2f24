"""Experts of a few tokens in C++: what the ``inductor`` backend runs on a CPU. The kernel is ``few_tokens.cpp``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from molora_kernels import backend, cpp
from molora_kernels.cpp import DTYPES, address, addresses
from molora_kernels.direct import is_plain


def serves(x: Tensor, outputs: Sequence[Tensor], masters: Sequence[Tensor]) -> bool:
    """Whether this module computes of these tensors under the present choice of backend, and nobody traces it."""
    if x.dtype not in DTYPES or not backend.compiles(x.device.type) or not is_plain(x):
        return False
    if any(y.dtype != x.dtype for y in outputs) or any(t.dtype != torch.float32 for t in masters):
        return False
    return cpp.compiled(x.device, _functions)


def few_tokens(
    x_TK: Tensor,
    outputs_TN: Sequence[Tensor],
    lora_a_RK: Sequence[Tensor],
    lora_b_NR: Sequence[Tensor],
    scaling: float,
    router_weights_EK: Sequence[Tensor],
    router_biases_E: Sequence[Tensor],
    top_k: int,
    gates_HTE: Tensor | None,
) -> Tensor | None:
    """As ``portable.few_tokens``."""
    x = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    a, b, weights, biases = (
        [t.contiguous() for t in given] for given in (lora_a_RK, lora_b_NR, router_weights_EK, router_biases_E)
    )
    heads, experts = 0, 1
    if weights:
        heads, experts = len(weights), weights[0].shape[0]
        gates = x.new_empty(heads, x.shape[0], experts, dtype=torch.float32)
    elif gates_HTE is not None:
        gates = gates_HTE.to(torch.float32).contiguous()
        heads, _, experts = gates.shape
    else:
        gates = None
    of_weights, of_biases = addresses(weights), addresses(biases)
    projections = (_Projection * len(a))(*(
        (a.data_ptr(), b.data_ptr(), y.data_ptr(), y.shape[1], y.shape[1])
        for a, b, y in zip(a, b, outputs_TN, strict=True)
    ))  # fmt: skip
    call = _Call(
        projections, len(a), x.data_ptr(), x.stride(0), *x.shape, experts, a[0].shape[0] // experts,
        ctypes.cast(of_weights, ctypes.c_void_p) if of_weights else None,
        ctypes.cast(of_biases, ctypes.c_void_p) if of_biases else None,
        heads, top_k, address(gates), scaling, torch.get_num_threads(),
    )  # fmt: skip
    _functions()[f"few_tokens_{DTYPES[x.dtype]}"](ctypes.byref(call))
    increment_version(outputs_TN)  # which PyTorch does not see written
    return gates


class _Projection(ctypes.Structure):
    """The same fields as in few_tokens.cpp; so has the next."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "y")),
        *((name, ctypes.c_int64) for name in ("ldy", "N")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("projections", ctypes.POINTER(_Projection)),
        ("G", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("ldx", "T", "K", "E", "r")),
        *((name, ctypes.c_void_p) for name in ("weights", "biases")),
        *((name, ctypes.c_int64) for name in ("H", "k")),
        ("gates", ctypes.c_void_p),
        ("scaling", ctypes.c_double),
        ("threads", ctypes.c_int64),
    )


@functools.cache
def _functions() -> cpp.Functions:
    return cpp.functions(
        Path(__file__).with_name("few_tokens.cpp"), [(f"few_tokens_{dtype}", "p") for dtype in DTYPES.values()]
    )
