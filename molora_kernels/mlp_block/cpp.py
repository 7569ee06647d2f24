"""SwiGLU in C++: what the ``inductor`` backend runs on a CPU in fp32 and bf16. The kernels are ``swiglu.cpp``; what
they compute is defined in ``portable.py``.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from molora_kernels import cpp, one_pass
from molora_kernels.cpp import DTYPES


def serves(*tensors: Tensor) -> bool:
    """Whether this module computes with these tensors, of one dtype, under the present choice of backend. Of a few
    numbers, as with compiled passes, PyTorch does: its last bits are those of the frozen block."""
    like = tensors[0]
    if like.dtype not in DTYPES or like.numel() < one_pass.LEAST_ELEMENTS:
        return False
    return all(t.is_contiguous() for t in tensors) and cpp.compiled(like.device, _functions)


def swiglu(h_gate: Tensor, h_up: Tensor, out: Tensor) -> None:
    _call("swiglu", h_gate, h_up, out)


def swiglu_backward_(dh: Tensor, h_gate: Tensor, h_up: Tensor, h: Tensor, dh_up: Tensor) -> None:
    _call("swiglu_backward", dh, h_gate, h_up, h, dh_up)


def _call(function: str, *tensors: Tensor) -> None:
    addresses = (t.data_ptr() for t in tensors)
    _functions()[f"{function}_{DTYPES[tensors[0].dtype]}"](*addresses, tensors[0].numel(), torch.get_num_threads())


_SIGNATURES = (
    *((f"swiglu_{dtype}", "pppni") for dtype in DTYPES.values()),
    *((f"swiglu_backward_{dtype}", "pppppni") for dtype in DTYPES.values()),
)


@functools.cache
def _functions() -> cpp.Functions:
    return cpp.functions(Path(__file__).with_name("swiglu.cpp"), _SIGNATURES)
