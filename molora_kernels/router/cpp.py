"""What routers do with their logits in C++: what the ``inductor`` backend runs on a CPU. The kernels are
``router.cpp``; what they compute is defined in ``portable.py``, where some thirty operations on a few numbers a token
take longer than products do.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from molora_kernels import cpp
from molora_kernels.cpp import address

_SIGNATURES = (("route", "ppppnnnnpppi"), ("route_backward", "pppppnnnnpi"))


def serves(logits: Tensor) -> bool:
    """Whether this module computes with these logits under the present choice of backend."""
    return logits.dtype == torch.float32 and cpp.compiled(logits.device, _functions)


def forward(
    logits_THE: Tensor, bias_HE: Tensor | None, selection_bias_HE: Tensor | None, mask_T: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``portable.forward``, of the logits without their bias, which is added to them."""
    T, H, E = logits_THE.shape
    gates, sums, counts = (logits_THE.new_empty(shape) for shape in ((T, H, E), (H, 1 + E), (H, E)))
    bias, selection, mask = _fp32(bias_HE), _fp32(selection_bias_HE), _flags(mask_T)
    _functions()["route"](
        logits_THE.data_ptr(), address(bias), address(selection), address(mask), T, H, E, top_k,
        gates.data_ptr(), sums.data_ptr(), counts.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return gates, logits_THE, sums, counts


def dlogits_of(
    dgates_THE: Tensor | None,
    dsums_HS: Tensor | None,
    logits_THE: Tensor,
    gates_THE: Tensor,
    mask_T: Tensor | None,
    top_k: int,
) -> Tensor:
    """As ``portable.dlogits_of``."""
    T, H, E = logits_THE.shape
    dgates, dsums, mask = _fp32(dgates_THE), _fp32(dsums_HS), _flags(mask_T)
    logits, gates, dlogits = logits_THE.contiguous(), gates_THE.contiguous(), logits_THE.new_empty(T, H, E)
    _functions()["route_backward"](
        address(dgates), address(dsums), logits.data_ptr(), gates.data_ptr(), address(mask), T, H, E, top_k,
        dlogits.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dlogits


def _fp32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32).contiguous()


def _flags(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.bool).contiguous()


@functools.cache
def _functions() -> cpp.Functions:
    return cpp.functions(Path(__file__).with_name("router.cpp"), _SIGNATURES)
