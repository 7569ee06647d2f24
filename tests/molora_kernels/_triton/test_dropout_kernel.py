"""A kernel draws the same dropout bits as PyTorch."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from molora_kernels import dropout_mask  # noqa: E402
from molora_kernels._triton.dropout import kept, row_keys  # noqa: E402
from molora_kernels.dropout import threshold  # noqa: E402


@triton.jit
def mask_kernel(p_seed, p_out, T, K, stream, cut, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_kept = kept(row_keys(p_seed, o_t, stream), tl.program_id(1) * BLOCK_K, cut, BLOCK_K)
    tl.store(p_out + o_t[:, None] * K + o_k[None, :], b_kept, mask=(o_t < T)[:, None] & (o_k < K)[None, :])


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("stream", [0, 1, 3])
def test_kernel_draws_the_same_bits(p: float, stream: int, device: torch.device) -> None:
    for seed in (0, 1, -1, 2**62 + 12345, -(2**63)):
        s = torch.tensor(seed, device=device)
        for rows, columns in ((1, 1), (37, 53), (16, 32)):
            out = torch.empty(rows, columns, dtype=torch.bool, device=device)
            grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 32))
            mask_kernel[grid](s, out, rows, columns, stream, threshold(p), BLOCK_T=16, BLOCK_K=32)
            assert torch.equal(out, dropout_mask(s, rows, columns, p, stream))
