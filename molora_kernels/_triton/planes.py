"""fp32 as three bf16 planes: what a router has to multiply bf16 tokens with on tensor cores, with every bit of it.
(Of normal numbers: below 1e-33 the lower planes run out of range.)

A product of two bf16 numbers is exact in fp32, and fp32's 24 bits are three times bf16's 8, so the products of the
three planes add up to that of the fp32 matrix. Split once and laid side by side they are columns of one more product.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps nor that constexpr takes an int.)
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton import tiles
from molora_kernels._triton.cases import Case
from molora_kernels._triton.dot import bf16_terms
from molora_kernels._triton.tiles import Capability, Tiles, cdiv, launching_on

PLANES: tl.constexpr = tl.constexpr(tiles.PLANES)
TILES = Tiles(block_t=0, block_k=1024)


@triton.jit
def planes_kernel(p_x, p_planes, n, BLOCK: tl.constexpr):
    """planes (3, n) bf16, largest terms first, whose sum is x (n,) fp32."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_high, b_middle, b_low = bf16_terms(tl.load(p_x + o_n, mask=m_n, other=0.0))
    tl.store(p_planes + o_n, b_high, mask=m_n)
    tl.store(p_planes + n + o_n, b_middle, mask=m_n)
    tl.store(p_planes + n + n + o_n, b_low, mask=m_n)  # two steps: 2 n may be more than an int32 holds


def planes(x: Tensor) -> Tensor:
    """(3, *x.shape) bf16 of contiguous fp32 x."""
    made, n = x.new_empty(3, *x.shape, dtype=torch.bfloat16), x.numel()
    if n:
        with launching_on(x.device):
            planes_kernel[(cdiv(n, TILES.block_k),)](
                x.contiguous(), made, n, BLOCK=TILES.block_k, num_warps=TILES.num_warps
            )
    return made


def compile_cases(_: Capability) -> Iterator[Case]:
    yield Case(
        kernel=planes_kernel,
        label="fp32",
        pointers=dict(p_x=torch.float32, p_planes=torch.bfloat16),
        scalars=dict(n=8192 * 8),
        constants=dict(BLOCK=TILES.block_k),
        tiles=TILES,
        tensor_cores=False,
    )
