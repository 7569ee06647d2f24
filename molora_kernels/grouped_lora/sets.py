"""Tokens sorted by the set of experts that they chose, on the GPU and without asking it anything: what the grouped
form's kernels work on.

Tiles of the sorted tokens need no padding and no alignment to a set: each has the list of all experts that one of its
tokens chose, mostly the k of one set, and at worst all E. So the grid is ``ceil(T / rows)`` whatever was chosen.

Shape letters: T tokens, E experts, E_PAD padded to a power of two, k experts chosen per token, I tiles.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps nor that constexpr takes an int.)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton.cases import Case
from molora_kernels._triton.routing import choose
from molora_kernels._triton.tiles import Capability, Tiles, cdiv, launching_on, next_power_of_2

MAX_EXPERTS = 64
"""A set is one bit per expert of an int64."""
CHOICES = Tiles(block_t=32, block_k=0)


@triton.jit
def choices_kernel(
    p_gates,
    p_chosen,
    p_slots,
    p_sets,
    T,
    stride_t,
    stride_e,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The TOP_K gates of largest magnitude, as experts in ascending order (T, k), as slots (T, E), and as bits (T,).

    A chosen gate may have underflowed to zero; another zero may take its place. NaN counts as zero, so that every token
    has k experts whatever it holds.
    """
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, E_PAD)
    m_t, m_e = o_t < T, o_e < E
    o_row = o_t.to(tl.int64)[:, None]
    m = m_t[:, None] & m_e[None, :]
    b_gates = tl.load(p_gates + o_row * stride_t + o_e[None, :] * stride_e, mask=m, other=0.0)
    b_chosen = choose(tl.where(b_gates == b_gates, tl.abs(b_gates), 0.0), TOP_K, E, E_PAD).to(tl.int32)
    b_slot = tl.cumsum(b_chosen, axis=1) - 1
    m_chosen = m & (b_chosen != 0)
    b_expert = tl.broadcast_to(o_e[None, :], b_slot.shape)
    tl.store(p_chosen + o_row * TOP_K + b_slot, b_expert.to(tl.int64), mask=m_chosen)
    tl.store(p_slots + o_row * E + o_e[None, :], tl.where(m_chosen, b_slot, -1).to(tl.int8), mask=m)
    b_bits = b_chosen.to(tl.int64) << o_e.to(tl.int64)[None, :]
    tl.store(p_sets + o_t, tl.sum(b_bits, axis=1), mask=m_t)


@triton.jit
def union_kernel(p_slots, p_order, p_experts, p_counts, T, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of each tile of sorted tokens, the experts that any of them chose (I, E), ascending, and how many (I,)."""
    i_t = tl.program_id(0)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, E_PAD)
    m_t = o_t < T
    b_row = tl.load(p_order + o_t, mask=m_t, other=0)
    b_slots = tl.load(p_slots + b_row[:, None] * E + o_e[None, :], mask=m_t[:, None] & (o_e < E)[None, :], other=-1)
    b_present = (tl.max(b_slots.to(tl.int32), axis=0) >= 0).to(tl.int32)
    o_list = tl.cumsum(b_present, axis=0) - 1
    tl.store(p_experts + i_t.to(tl.int64) * E + o_list, o_e, mask=b_present != 0)
    tl.store(p_counts + i_t, tl.sum(b_present, axis=0))


@dataclass(frozen=True)
class Sets:
    """What T tokens chose, and the two orders in which kernels visit them."""

    chosen: Tensor
    """(T, k) int64, ascending"""
    slots: Tensor
    """(T, E) int8: where in ``chosen`` an expert stands, -1 where it was not chosen"""
    order: Tensor
    """(T,) int64: tokens sorted by their set"""
    experts: Tensor
    """(I, E) int32: of each tile of ``order``, the experts that any of its tokens chose; what follows is anything"""
    counts: Tensor
    """(I,) int32: how many these are"""
    rows: int
    """tokens of a tile"""

    @cached_property
    def by_expert(self) -> tuple[Tensor, Tensor]:
        """The T k (token, slot) pairs sorted by expert, as ``token * k + slot`` (T k,), and where each expert's begin
        (E + 1,); both int64. Sorted when first asked for: forward has no use for them, backward several."""
        experts, pairs = self.chosen.flatten().to(torch.uint8).sort(stable=True)
        starts = torch.arange(self.slots.shape[1] + 1, dtype=torch.uint8, device=experts.device)
        return pairs, torch.searchsorted(experts, starts)


def _narrowest(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32 if bits < 32 else torch.int64


def sets_of(gates_TE: Tensor, top_k: int, rows: int) -> Sets:
    """Sets of the ``top_k`` largest gates of each token, for tiles of ``rows`` tokens."""
    T, E = gates_TE.shape
    if E > MAX_EXPERTS:
        raise ValueError(f"grouped_lora: the grouped form's kernels take up to {MAX_EXPERTS} experts, not {E}")
    tiles, e_pad = cdiv(T, rows), next_power_of_2(E)
    like = gates_TE.device
    chosen = torch.empty(T, top_k, dtype=torch.int64, device=like)
    slots = torch.empty(T, E, dtype=torch.int8, device=like)
    sets = torch.empty(T, dtype=_narrowest(E), device=like)  # a sort takes a pass for each byte
    experts = torch.empty(tiles, E, dtype=torch.int32, device=like)
    counts = torch.empty(tiles, dtype=torch.int32, device=like)
    if not T:
        return Sets(chosen, slots, torch.empty(T, dtype=torch.int64, device=like), experts, counts, rows)
    with launching_on(like):
        choices_kernel[(cdiv(T, CHOICES.block_t),)](
            gates_TE, chosen, slots, sets, T, gates_TE.stride(0), gates_TE.stride(1),
            TOP_K=top_k, E=E, E_PAD=e_pad, BLOCK_T=CHOICES.block_t, num_warps=CHOICES.num_warps,
        )  # fmt: skip
        order = sets.sort(stable=True).indices
        union_kernel[(tiles,)](
            slots, order, experts, counts, T, E=E, E_PAD=e_pad, BLOCK_T=rows, num_warps=CHOICES.num_warps
        )
    return Sets(chosen, slots, order, experts, counts, rows)


def compile_cases(_: Capability) -> Iterator[Case]:
    for E, k, rows in ((4, 1, 64), (32, 2, 32), (64, 8, 64)):
        yield Case(
            kernel=choices_kernel,
            label=f"E={E} k={k}",
            pointers=dict(p_gates=torch.float32, p_chosen=torch.int64, p_slots=torch.int8, p_sets=_narrowest(E)),
            scalars=dict(T=8192, stride_t=2 * E, stride_e=1),
            constants=dict(TOP_K=k, E=E, E_PAD=next_power_of_2(E), BLOCK_T=CHOICES.block_t),
            tiles=CHOICES,
            tensor_cores=False,
        )
        yield Case(
            kernel=union_kernel,
            label=f"E={E} rows={rows}",
            pointers=dict(p_slots=torch.int8, p_order=torch.int64, p_experts=torch.int32, p_counts=torch.int32),
            scalars=dict(T=8192),
            constants=dict(E=E, E_PAD=next_power_of_2(E), BLOCK_T=rows),
            tiles=Tiles(block_t=rows, block_k=0, num_warps=CHOICES.num_warps),
            tensor_cores=False,
        )
