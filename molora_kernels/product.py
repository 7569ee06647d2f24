"""Matrix products of the portable backend: oneDNN's where PyTorch would take a slower library.

PyTorch gives fp32 products on a CPU to MKL, whose best paths are for Intel's CPUs. On an AMD CPU with AVX512 oneDNN,
which PyTorch has for 16-bit products and for compiled models, takes 10 to 15 % less time for the same product
(docs/log.md). Elsewhere, and for other dtypes, all of this is ``torch.mm``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora_kernels import workspace
from molora_kernels.cpu import prefers_onednn

LEAST = 1 << 29
"""Multiplications from which oneDNN is asked. It compiles a product for each new number of rows, in 0.7 ms, and batches
have ever new ones: a tenth of a product of this size is as much."""


def mm(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None, *, lasting: bool = False) -> Tensor:
    """``a b + bias``, in the workspace or in memory to be returned or saved; oneDNN takes memory of its own."""
    if by_onednn(a_MK, b_KN):
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.T, bias_N, "none", [], "")
    out = (workspace.lasting if lasting else workspace.empty)(a_MK, len(a_MK), b_KN.shape[1])
    return torch.mm(a_MK, b_KN, out=out) if bias_N is None else torch.addmm(bias_N, a_MK, b_KN, out=out)


def mm_into(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """``a b``, written to ``out``: columns of a wider matrix. For few of them: what oneDNN gives is copied."""
    if by_onednn(a_MK, b_KN):
        out_MN.copy_(mm(a_MK, b_KN))
    else:
        torch.mm(a_MK, b_KN, out=out_MN)


def add_mm(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """``sum + a b``: in the place of ``sum``, which is used up, or in memory of its own."""
    if by_onednn(a_MK, b_KN):
        return torch.ops.mkldnn._linear_pointwise.binary(a_MK, sum_MN, b_KN.T, None, "add")
    return sum_MN.addmm_(a_MK, b_KN)


def by_onednn(a_MK: Tensor, b_KN: Tensor) -> bool:
    if a_MK.dtype != torch.float32 or a_MK.device.type != "cpu" or a_MK.numel() * b_KN.shape[1] < LEAST:
        return False
    return prefers_onednn() and bool(torch.backends.mkldnn.enabled)
