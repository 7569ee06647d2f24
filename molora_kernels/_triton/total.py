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
from typing import Final, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.dot import bf16_terms
from molora_kernels._triton.tiles import Capability, Tiles, cdiv, launching_on

AS_PLANES: Final = "planes"
Kind = torch.dtype | Literal["planes"]
"""What a result is made as: rounded once to a dtype, or in three bf16 planes (3, ...), largest terms first, whose sum
has every bit of it: fp32's 24 bits are three times bf16's 8. (Of normal numbers: below 1e-33 the lower planes run out
of range.)

So a router multiplies bf16 tokens with fp32 numbers on tensor cores. A product of two bf16 numbers is exact in fp32,
and those of the planes add up to that of the fp32 matrix; split once and laid side by side they are columns of one
more product.
"""

TILES = Tiles(block_t=0, block_k=1024)


@triton.jit
def _total_of_one(p_terms, p_sum, o_n, n, stride, plane, SPLITS: tl.constexpr, AS_PLANES: tl.constexpr):
    m_n = o_n < n
    b_sum = tl.load(p_terms + o_n, mask=m_n, other=0.0).to(tl.float32)
    for i_s in range(1, SPLITS):
        b_sum += tl.load(p_terms + i_s * stride + o_n, mask=m_n, other=0.0)
    if AS_PLANES:
        b_high, b_middle, b_low = bf16_terms(b_sum)
        tl.store(p_sum + o_n, b_high, mask=m_n)
        tl.store(p_sum + plane + o_n, b_middle, mask=m_n)
        tl.store(p_sum + plane + plane + o_n, b_low, mask=m_n)  # two steps: twice may be more than an int32 holds
    else:
        tl.store(p_sum + o_n, b_sum.to(p_sum.dtype.element_ty), mask=m_n)


@triton.jit
def total_kernel(
    p_terms, p_sums, offsets, sizes, strides, planes, SPLITS: tl.constexpr, AS_PLANES: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each i: sums_i, from offset_i on, (n_i,) of the first n_i elements of each of SPLITS_i terms, in fp32, rounded
    once, or AS_PLANES_i the three planes of it, planes_i elements apart. A program finds which i it works for: their
    blocks follow one another."""
    i_b = tl.program_id(0)
    for i in tl.static_range(len(SPLITS)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (i_b >= 0) & (i_b < blocks):
            o_n = i_b.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            p_sum = p_sums[i] + offsets[i]
            _total_of_one(p_terms[i], p_sum, o_n, sizes[i], strides[i], planes[i], SPLITS[i], AS_PLANES[i])
        i_b -= blocks


def totals(groups: Sequence[Sequence[Tensor]], kinds: Sequence[Kind]) -> list[Tensor]:
    """Of each group the sums over the first dimension of its tensors (splits, M_i, ...), each term contiguous, below
    one another: (sum of M_i, ...) of its kind. Reads terms at the speed of memory, which ``Tensor.sum`` over few long
    rows does not."""
    return _made(groups, kinds, summed=True)


def joined(groups: Sequence[Sequence[Tensor]], kinds: Sequence[Kind]) -> list[Tensor]:
    """The tensors (M_i, ...) of each group below one another, contiguous, made as its kind: cast and moved by one
    launch. One alone that is so already is itself."""
    there = [len(group) == 1 and group[0].dtype == kind for group, kind in zip(groups, kinds, strict=True)]
    moved = [[t.contiguous() for t in group] for group, one in zip(groups, there, strict=True) if not one]
    made = iter(_made(moved, [kind for kind, one in zip(kinds, there, strict=True) if not one], summed=False))
    return [group[0].contiguous() if one else next(made) for group, one in zip(groups, there, strict=True)]


def _made(groups: Sequence[Sequence[Tensor]], kinds: Sequence[Kind], *, summed: bool) -> list[Tensor]:
    plan = plan_of(tuple([tuple([t.shape for t in group]) for group in groups]), tuple(kinds), summed)
    made = [
        group[0].new_empty(shape, dtype=d) for group, shape, d in zip(groups, plan.shapes, plan.dtypes, strict=True)
    ]
    if plan.blocks:
        terms = tuple([t for group in groups for t in group])
        strides = tuple([t.stride(0) for t in terms]) if summed else plan.sizes  # of a single term: any
        with launching_on(made[0].device):
            total_kernel[(plan.blocks,)](
                terms, tuple([made[i] for i in plan.groups]), plan.offsets, plan.sizes, strides, plan.planes,
                SPLITS=plan.splits, AS_PLANES=plan.as_planes, BLOCK=TILES.block_k, num_warps=TILES.num_warps,
            )  # fmt: skip
    return made


class Plan(NamedTuple):
    """Where the kernel finds and leaves each tensor: what follows from shapes and kinds alone."""

    shapes: list[torch.Size]
    """Of each group's result."""
    dtypes: list[torch.dtype]
    groups: list[int]
    """Of each tensor, the group it belongs to; the others likewise."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    splits: tuple[int, ...]
    planes: tuple[int, ...]
    as_planes: tuple[bool, ...]
    blocks: int


@functools.lru_cache(maxsize=1024)
def plan_of(groups: tuple[tuple[torch.Size, ...], ...], kinds: tuple[Kind, ...], summed: bool) -> Plan:
    """Of shapes (splits, M_i, ...) to be ``summed``, or (M_i, ...), groups of which come below one another."""
    shapes, dtypes, members, offsets, sizes, splits, planes, as_planes = [], [], [], [], [], [], [], []
    first = 1 if summed else 0
    for i, (group, kind) in enumerate(zip(groups, kinds, strict=True)):
        whole = torch.Size([sum(shape[first] for shape in group), *group[0][first + 1 :]])
        shapes.append(torch.Size((3, *whole)) if kind == AS_PLANES else whole)
        dtypes.append(torch.bfloat16 if kind == AS_PLANES else kind)
        offset = 0
        for shape in group:
            members.append(i)
            offsets.append(offset)
            sizes.append(shape[first:].numel())
            splits.append(shape[0] if summed else 1)
            planes.append(whole.numel() if kind == AS_PLANES else 0)
            as_planes.append(kind == AS_PLANES)
            offset += sizes[-1]
    blocks = sum(cdiv(n, TILES.block_k) for n in sizes)
    return Plan(shapes, dtypes, members, *map(tuple, (offsets, sizes, splits, planes, as_planes)), blocks)


def compile_cases(_: Capability) -> Iterator[Case]:
    size, small = 128 * 8192, 4 * 3072
    for dtype in DTYPES:
        # an MLP's adapters joined, beside what its routers are read as; the gradients of adapters with masters of this
        # dtype, and of its routers
        planes = dtype == torch.bfloat16
        for what, splits, sums in (
            ("joined", (1,) * 9, (dtype,) * 6 + (torch.bfloat16 if planes else torch.float32,) * 3),
            ("totals", (5, 5, 4, 2, 2, 5, 5, 5, 4), (dtype,) * 6 + (torch.float32,) * 3),
        ):
            split = planes and what == "joined"
            yield Case(
                kernel=total_kernel,
                label=f"{short(dtype)} {what}",
                pointers=dict(p_terms=(torch.float32,) * 9, p_sums=sums),
                scalars=dict(offsets=(0, size, *(0,) * 5, small, 0), sizes=(size,) * 6 + (small,) * 3)
                | dict(strides=(size,) * 6 + (small,) * 3)
                | dict(planes=(0,) * 6 + ((2 * small, 2 * small, small) if split else (0,) * 3)),
                constants=dict(SPLITS=splits, AS_PLANES=(False,) * 6 + (split,) * 3, BLOCK=TILES.block_k),
                tiles=TILES,
                tensor_cores=False,
            )  # fmt: skip
