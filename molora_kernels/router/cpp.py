"""Routers in C++: what the ``inductor`` backend runs on a CPU. The kernels are ``router.cpp``; what they compute is
defined in ``portable.py``, where some thirty operations on a few numbers a token take longer than products do.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from molora_kernels import cpp
from molora_kernels.cpp import DTYPES, address, addresses


def serves(x: Tensor) -> bool:
    """Whether this module computes of rows like x under the present choice of backend."""
    return x.dtype in DTYPES and cpp.compiled(x.device, _functions)


def forward(
    x_TK: Tensor,
    weights_EK: list[Tensor],
    biases_E: list[Tensor],
    selection_biases_E: list[Tensor],
    mask_T: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``portable.forward``."""
    x, weights, mask = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous(), _all_fp32(weights_EK), _flags(mask_T)
    biases, selection = _all_fp32(biases_E), _all_fp32(selection_biases_E)
    (T, K), H, E = x.shape, len(weights), weights[0].shape[0]
    logits, gates, sums, counts = (
        x.new_empty(shape, dtype=torch.float32) for shape in ((T, H, E), (T, H, E), (H, 1 + E), (H, E))
    )
    _functions()[f"route_{DTYPES[x.dtype]}"](
        x.data_ptr(), x.stride(0), K, addresses(weights), addresses(biases), addresses(selection), address(mask),
        T, H, E, top_k, logits.data_ptr(), gates.data_ptr(), sums.data_ptr(), counts.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return gates, logits, sums, counts


def dlogits_of(
    dgates_THE: Tensor | None,
    dsums_HS: Tensor | None,
    logits_THE: Tensor,
    gates_THE: Tensor,
    mask_T: Tensor | None,
    top_k: int,
    need_dbias: bool,
) -> tuple[Tensor, list[Tensor]]:
    """As ``portable.dlogits_of``."""
    T, H, E = logits_THE.shape
    dgates, dsums = (None if d is None else d.to(torch.float32).contiguous() for d in (dgates_THE, dsums_HS))
    logits, gates, mask = logits_THE.contiguous(), gates_THE.contiguous(), _flags(mask_T)
    dlogits, dbiases = logits_THE.new_empty(T, H, E), [logits_THE.new_empty(E) for _ in range(H if need_dbias else 0)]
    _functions()["route_backward"](
        address(dgates), address(dsums), logits.data_ptr(), gates.data_ptr(), address(mask), T, H, E, top_k,
        dlogits.data_ptr(), addresses(dbiases), torch.get_num_threads(),
    )  # fmt: skip
    return dlogits, dbiases


def _all_fp32(tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(torch.float32).contiguous() for t in tensors]


def _flags(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.bool).contiguous()


_SIGNATURES = (
    *((f"route_{dtype}", "pnnppppnnnnppppi") for dtype in DTYPES.values()),
    ("route_backward", "pppppnnnnppi"),
)


@functools.cache
def _functions() -> cpp.Functions:
    return cpp.functions(Path(__file__).with_name("router.cpp"), _SIGNATURES)
