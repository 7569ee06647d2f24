"""The last step of a reduction over tokens: terms over runs of rows, added up in their order."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps nor that constexpr takes an int.)
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.tiles import Capability, Tiles, cdiv, launching_on

TILES = Tiles(block_t=0, block_k=1024)


@triton.jit
def total_kernel(p_terms, p_sum, n, stride, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """sum (n,) of the first n elements of each of SPLITS terms, in fp32, rounded once."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i_s in range(SPLITS):
        b_sum += tl.load(p_terms + i_s * stride + o_n, mask=m_n, other=0.0)
    tl.store(p_sum + o_n, b_sum.to(p_sum.dtype.element_ty), mask=m_n)


def total(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first dimension of fp32 terms (splits, M, N), each contiguous, in ``dtype``. Reads them at the speed
    of memory, which ``Tensor.sum`` over few long rows does not."""
    assert terms[0].is_contiguous()
    made = terms.new_empty(terms.shape[1:], dtype=dtype)
    if n := made.numel():
        with launching_on(terms.device):
            total_kernel[(cdiv(n, TILES.block_k),)](
                terms, made, n, terms.stride(0), SPLITS=len(terms), BLOCK=TILES.block_k, num_warps=TILES.num_warps
            )
    return made


def compile_cases(_: Capability) -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case(
            kernel=total_kernel,
            label=short(dtype),
            pointers=dict(p_terms=torch.float32, p_sum=dtype),
            scalars=dict(n=128 * 8192, stride=128 * 8192),
            constants=dict(SPLITS=4, BLOCK=TILES.block_k),
            tiles=TILES,
            tensor_cores=False,
        )
