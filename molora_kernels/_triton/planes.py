"""fp32 as three bf16 planes: what a router has to multiply bf16 tokens with on tensor cores, with every bit of it.
(Of normal numbers: below 1e-33 the lower planes run out of range.)

A product of two bf16 numbers is exact in fp32, and fp32's 24 bits are three times bf16's 8, so the products of the
three planes add up to that of the fp32 matrix. Split once and laid side by side they are columns of one more product.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps, nor that constexpr takes an int, nor
# that arguments can be tuples.)
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton import tiles
from molora_kernels._triton.cases import Case
from molora_kernels._triton.dot import bf16_terms
from molora_kernels._triton.tiles import Capability, launching_on
from molora_kernels._triton.total import TILES, plan_of

PLANES: tl.constexpr = tl.constexpr(tiles.PLANES)


@triton.jit
def _planes_of_one(p_x, p_planes, o_n, n, stride):
    m_n = o_n < n
    b_high, b_middle, b_low = bf16_terms(tl.load(p_x + o_n, mask=m_n, other=0.0).to(tl.float32))
    tl.store(p_planes + o_n, b_high, mask=m_n)
    tl.store(p_planes + stride + o_n, b_middle, mask=m_n)
    tl.store(p_planes + stride + stride + o_n, b_low, mask=m_n)  # two steps: twice may be more than an int32 holds


@triton.jit
def planes_kernel(p_xs, p_planes, offsets, sizes, strides, BLOCK: tl.constexpr):
    """Of each i: planes_i bf16, a stride_i apart, largest terms first, whose sum is x_i (n_i,) fp32 from offset_i on.
    A program finds which i it works for: their blocks follow one another."""
    i_b = tl.program_id(0)
    for i in tl.static_range(len(p_xs)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (i_b >= 0) & (i_b < blocks):
            o_n = i_b.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            _planes_of_one(p_xs[i], p_planes[i] + offsets[i], o_n, sizes[i], strides[i])
        i_b -= blocks


def planes(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Of each group of fp32 tensors (M_i, N), below one another: (3, sum of M_i, N) bf16. All by one launch."""
    plan = plan_of(tuple([tuple([torch.Size((1, *t.shape)) for t in group]) for group in groups]))
    made = [g[0].new_empty(3, *shape, dtype=torch.bfloat16) for g, shape in zip(groups, plan.shapes, strict=True)]
    if plan.blocks:
        targets = tuple([made[i] for i in plan.groups])
        with launching_on(made[0].device):
            planes_kernel[(plan.blocks,)](
                tuple([one.contiguous() for group in groups for one in group]), targets, plan.offsets, plan.sizes,
                tuple([t.stride(0) for t in targets]), BLOCK=TILES.block_k, num_warps=TILES.num_warps,
            )  # fmt: skip
    return made


def compile_cases(_: Capability) -> Iterator[Case]:
    size = 4 * 3072
    yield Case(
        kernel=planes_kernel,
        label="fp32",
        pointers=dict(p_xs=(torch.float32,) * 3, p_planes=(torch.bfloat16,) * 3),
        scalars=dict(offsets=(0, size, 0), sizes=(size,) * 3, strides=(2 * size, 2 * size, size)),
        constants=dict(BLOCK=TILES.block_k),
        tiles=TILES,
        tensor_cores=False,
    )
