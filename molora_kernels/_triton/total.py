"""Several tensors added up, cast or moved by one launch: the last step of reductions over tokens, which are terms over
runs of rows added up in their order, and the first of every call, which casts fp32 masters and joins them.

Each is a few MB at most, so that a launch for each would be most of what it costs.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps, nor that constexpr takes an int, nor
# that arguments can be tuples.)
from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    another: (sum of M_i, N) in its dtype. Reads terms at the speed of memory, which ``Tensor.sum`` over few long rows
    does not."""
    plan = plan_of(tuple([tuple([t.shape for t in group]) for group in groups]))
    made = [g[0].new_empty(shape, dtype=d) for g, shape, d in zip(groups, plan.shapes, dtypes, strict=True)]
    if plan.blocks:
        terms = [t for group in groups for t in group]
        with launching_on(made[0].device):
            total_kernel[(plan.blocks,)](
                tuple(terms), tuple([made[i] for i in plan.groups]), plan.offsets, plan.sizes,
                tuple([t.stride(0) for t in terms]), SPLITS=plan.splits, BLOCK=TILES.block_k, num_warps=TILES.num_warps,
            )  # fmt: skip
    return made


class Plan(NamedTuple):
    """Where a kernel that works on groups of tensors finds and leaves each: what follows from their shapes alone."""

    shapes: list[torch.Size]
    """Of each group's result."""
    groups: list[int]
    """Of each tensor, the group it belongs to; the others likewise."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    splits: tuple[int, ...]
    blocks: int


@functools.lru_cache(maxsize=1024)
def plan_of(groups: tuple[tuple[torch.Size, ...], ...]) -> Plan:
    """Of shapes (splits, M_i, N), groups of which come below one another."""
    shapes, members, offsets, sizes, splits = [], [], [], [], []
    for i, group in enumerate(groups):
        shapes.append(torch.Size([sum(shape[1] for shape in group), *group[0][2:]]))
        offset = 0
        for shape in group:
            members.append(i)
            offsets.append(offset)
            sizes.append(shape[1:].numel())
            splits.append(shape[0])
            offset += sizes[-1]
    blocks = sum(cdiv(n, TILES.block_k) for n in sizes)
    return Plan(shapes, members, tuple(offsets), tuple(sizes), tuple(splits), blocks)


def joined(groups: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """The tensors (M_i, N) of each group below one another, contiguous, in ``dtype``: cast and moved by one launch. One
    alone that is so already is itself."""
    there = [len(group) == 1 and group[0].dtype == dtype for group in groups]
    sources = [[t.contiguous()[None] for t in group] for group, one in zip(groups, there, strict=True) if not one]
    made = iter(totals(sources, [dtype] * len(sources)) if sources else ())
    return [group[0].contiguous() if one else next(made) for group, one in zip(groups, there, strict=True)]


def compile_cases(_: Capability) -> Iterator[Case]:
    size = 128 * 8192
    for dtype in DTYPES:
        # an MLP's adapters joined; the gradients of adapters with masters of this dtype, and of its routers
        for what, splits, sums in (
            ("joined", (1,) * 6, (dtype,) * 6),
            ("totals", (5, 5, 4, 2, 2, 5, 5, 5, 4), (dtype,) * 6 + (torch.float32,) * 3),
        ):
            yield Case(
                kernel=total_kernel,
                label=f"{short(dtype)} {what}",
                pointers=dict(p_terms=(torch.float32,) * len(sums), p_sums=sums),
                scalars=dict(offsets=(0, size) + (0,) * (len(sums) - 2))
                | dict.fromkeys(("sizes", "strides"), (size,) * len(sums)),
                constants=dict(SPLITS=splits, BLOCK=TILES.block_k),
                tiles=TILES,
                tensor_cores=False,
            )  # fmt: skip
