"""Several tensors added up, cast or moved by one launch: the last step of reductions over tokens, which are terms over
runs of rows added up in their order, and the first of every call, which casts fp32 masters and joins them.

Each is a few MB at most, so that a launch for each would be most of what it costs.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps, nor that constexpr takes an int, nor
# that arguments can be tuples.)
from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.tiles import Capability, Tiles, cdiv, launching_on

TILES = Tiles(block_t=0, block_k=1024)


@triton.jit
def _total_of_one(p_terms, p_sum, o_n, n, stride, SPLITS: tl.constexpr):
    m_n = o_n < n
    b_sum = tl.load(p_terms + o_n, mask=m_n, other=0.0).to(tl.float32)
    for i_s in range(1, SPLITS):
        b_sum += tl.load(p_terms + i_s * stride + o_n, mask=m_n, other=0.0)
    tl.store(p_sum + o_n, b_sum.to(p_sum.dtype.element_ty), mask=m_n)


@triton.jit
def total_kernel(p_terms, p_sums, offsets, sizes, strides, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Of each i: sums_i, from offset_i on, (n_i,) of the first n_i elements of each of SPLITS_i terms, in fp32, rounded
    once. A program finds which i it works for: their blocks follow one another."""
    i_b = tl.program_id(0)
    for i in tl.static_range(len(SPLITS)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (i_b >= 0) & (i_b < blocks):
            o_n = i_b.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            _total_of_one(p_terms[i], p_sums[i] + offsets[i], o_n, sizes[i], strides[i], SPLITS[i])
        i_b -= blocks


def totals(groups: Sequence[Sequence[Tensor]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Of each group the sums over the first dimension of its tensors (splits, M_i, N), each term contiguous, below one
    another: (sum of M_i, N) in its dtype. Terms are read at the speed of memory, which ``Tensor.sum`` over few long rows
    does not."""
    made = [
        group[0].new_empty(sum(t.shape[1] for t in group), *group[0].shape[2:], dtype=dtype)
        for group, dtype in zip(groups, dtypes, strict=True)
    ]
    terms, sums, offsets, sizes = [], [], [], []
    for target, group in zip(made, groups, strict=True):
        offset = 0
        for one in group:
            terms.append(one)
            sums.append(target)
            offsets.append(offset)
            sizes.append(one.numel() // len(one))
            offset += sizes[-1]
    if blocks := sum(cdiv(n, TILES.block_k) for n in sizes):
        with launching_on(made[0].device):
            total_kernel[(blocks,)](
                tuple(terms), tuple(sums), tuple(offsets), tuple(sizes), tuple(t.stride(0) for t in terms),
                SPLITS=tuple(map(len, terms)), BLOCK=TILES.block_k, num_warps=TILES.num_warps,
            )  # fmt: skip
    return made


def joined(groups: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """The tensors (M_i, N) of each group below one another, contiguous, in ``dtype``: cast and moved by one launch. One
    alone that is so already is itself."""
    made = [group[0] if len(group) == 1 and group[0].dtype == dtype else None for group in groups]
    left = [[one.contiguous().unsqueeze(0) for one in group] for group, one in zip(groups, made, strict=True) if one is None]
    ready = iter(totals(left, [dtype] * len(left)) if left else ())
    return [next(ready) if one is None else one.contiguous() for one in made]


def compile_cases(_: Capability) -> Iterator[Case]:
    size = 128 * 8192
    for dtype, (what, splits) in itertools.product(DTYPES, (("totals", (5, 2, 2)), ("joined", (1, 1, 1)))):
        yield Case(
            kernel=total_kernel,
            label=f"{short(dtype)} {what}",
            pointers=dict(p_terms=(torch.float32,) * 3, p_sums=(dtype,) * 3),
            scalars=dict(offsets=(0, size, 0), sizes=(size,) * 3, strides=(size,) * 3),
            constants=dict(SPLITS=splits, BLOCK=TILES.block_k),
            tiles=TILES,
            tensor_cores=False,
        )
