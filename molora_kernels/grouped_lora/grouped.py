"""The grouped form on the GPU: only the experts that were chosen, on tokens sorted by their set (``sets.py``).

The shrink of a token keeps its k experts alone, side by side in ascending order: k * r columns instead of E * r.
``gating.py`` works on these as on k experts, with the k gates.

Shape letters: T tokens, K input features, N output features, G projections that read the same input, E experts, k
chosen per token, r rank of one expert, R = E * r, C = G * k * r columns of the compact shrink, H gate sets (G, or 1
shared by all projections).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps nor that constexpr takes an int.)
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels import dropout
from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.dot import dot, dot_of_many
from molora_kernels._triton.dropout import kept, row_keys
from molora_kernels._triton.tiles import Capability, capability_of, cdiv, launching_on
from molora_kernels._triton.total import joined, totals
from molora_kernels.grouped_lora import gating, portable_grouped, tiles
from molora_kernels.grouped_lora.forward import rows_contiguous
from molora_kernels.grouped_lora.sets import Sets, sets_of


@triton.jit
def set_shrink_kernel(
    p_x,
    p_a,
    p_seed,
    p_s,
    p_order,
    p_slots,
    p_experts,
    p_counts,
    T,
    K,
    E,
    r,
    stride_xt,
    stride_st,
    stride_ap,
    stride_ak,
    stream,
    threshold,
    keep_scale,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of each row of x the products with its experts' rows of a: s (T, k, r) from dropout(x) (T, K) and a (E * r, K).

    A program: one tile of sorted tokens, and the experts of its list, SLOTS of them side by side in one pass over x.
    What a token did not choose is computed too where another token of the tile did, and not stored.
    """
    i_t = tl.program_id(0)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    b_row = tl.load(p_order + o_t, mask=m_t, other=0)
    b_count = tl.load(p_counts + i_t)
    p_rows = p_x + b_row[:, None] * stride_xt
    if p_seed is not None:
        b_keys = row_keys(p_seed, b_row, stream)
    o_c = tl.arange(0, SLOTS * BLOCK_R)
    for i_s in range(tl.cdiv(b_count, SLOTS)):
        o_list = i_s * SLOTS + o_c // BLOCK_R
        b_expert = tl.load(p_experts + i_t.to(tl.int64) * E + o_list, mask=o_list < b_count, other=0)
        for i_r in range(tl.cdiv(r, BLOCK_R)):
            o_r = i_r * BLOCK_R + o_c % BLOCK_R
            m_c = (o_list < b_count) & (o_r < r)
            p_columns = p_a + (b_expert * r + o_r).to(tl.int64)[None, :] * stride_ap
            b_s = tl.zeros([BLOCK_T, SLOTS * BLOCK_R], dtype=tl.float32)
            for i_k in range(tl.cdiv(K, BLOCK_K)):
                o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
                m_k = o_k < K
                b_x = tl.load(p_rows + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
                p_block = p_columns + o_k.to(tl.int64)[:, None] * stride_ak
                b_a = tl.load(p_block, mask=m_k[:, None] & m_c[None, :], other=0.0)
                if p_seed is not None:
                    b_x = tl.where(kept(b_keys, i_k * BLOCK_K, threshold, BLOCK_K), b_x, 0.0)
                b_s = dot_of_many(b_x, b_a, b_s)
            if p_seed is not None:
                b_s *= keep_scale
            p_slot = p_slots + b_row[:, None] * E + b_expert[None, :]
            b_slot = tl.load(p_slot, mask=m_t[:, None] & m_c[None, :], other=-1).to(tl.int32)
            p_out = p_s + b_row[:, None] * stride_st + (b_slot * r + o_r[None, :])
            tl.store(p_out, b_s.to(p_s.dtype.element_ty), mask=b_slot >= 0)


@triton.jit
def set_expand_kernel(
    p_s,
    p_b,
    p_bias,
    p_seed,
    p_y,
    p_order,
    p_slots,
    p_experts,
    p_counts,
    T,
    N,
    E,
    r,
    stride_st,
    stride_bp,
    stride_bn,
    stream,
    threshold,
    keep_scale,
    ADD: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y (T, N) = dropout(sum over the k experts of a row of s (T, k, r) @ their rows of b (E * r, N)) + bias, or y +=.

    Each row of y is written by one program, whatever its experts are. Programs of the same tokens are neighbours.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    i_n, i_t = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t, m_n = o_t < T, o_n < N
    b_row = tl.load(p_order + o_t, mask=m_t, other=0)
    b_count = tl.load(p_counts + i_t)
    o_c = tl.arange(0, SLOTS * BLOCK_R)
    b_y = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for i_s in range(tl.cdiv(b_count, SLOTS)):
        o_list = i_s * SLOTS + o_c // BLOCK_R
        b_expert = tl.load(p_experts + i_t.to(tl.int64) * E + o_list, mask=o_list < b_count, other=0)
        for i_r in range(tl.cdiv(r, BLOCK_R)):
            o_r = i_r * BLOCK_R + o_c % BLOCK_R
            m_c = (o_list < b_count) & (o_r < r)
            p_slot = p_slots + b_row[:, None] * E + b_expert[None, :]
            b_slot = tl.load(p_slot, mask=m_t[:, None] & m_c[None, :], other=-1).to(tl.int32)
            p_left = p_s + b_row[:, None] * stride_st + (b_slot * r + o_r[None, :])
            b_s = tl.load(p_left, mask=b_slot >= 0, other=0.0)
            p_right = p_b + (b_expert * r + o_r).to(tl.int64)[:, None] * stride_bp
            p_right += o_n.to(tl.int64)[None, :] * stride_bn
            b_b = tl.load(p_right, mask=m_c[:, None] & m_n[None, :], other=0.0)
            b_y = dot(b_s, b_b, b_y)
    if p_seed is not None:
        m_kept = kept(row_keys(p_seed, b_row, stream), i_n * BLOCK_N, threshold, BLOCK_N)
        b_y = tl.where(m_kept, b_y * keep_scale, 0.0)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_out = p_y + b_row[:, None] * N + o_n[None, :]
    m_out = m_t[:, None] & m_n[None, :]
    if ADD:
        b_y += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_out)


@triton.jit
def expert_weight_kernel(
    p_left,
    p_x,
    p_seed,
    p_partials,
    p_pairs,
    p_starts,
    K,
    E,
    r,
    stride_lt,
    stride_xt,
    stride_op,
    stride_ok,
    stream,
    threshold,
    keep_scale,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partials (SPLITS, E * r, K): of each expert, left^T @ dropout(x) over the tokens that chose it, with left
    (T, k, r); its tokens are split in SPLITS runs. An expert that nobody chose gets zeros."""
    blocks_r = tl.cdiv(r, BLOCK_R)
    i_e, i_k, i_s = tl.program_id(0) // blocks_r, tl.program_id(1), tl.program_id(2)
    o_r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_r, m_k = o_r < r, o_k < K
    b_start, b_end = tl.load(p_starts + i_e).to(tl.int32), tl.load(p_starts + i_e + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(b_end - b_start, BLOCK_T), SPLITS) * BLOCK_T
    first = b_start + i_s * share
    last = tl.minimum(first + share, b_end)
    b_w = tl.zeros([BLOCK_K, BLOCK_R], dtype=tl.float32)
    for i in range(first, last, BLOCK_T):
        o_pair = i + tl.arange(0, BLOCK_T)
        m_t = o_pair < last
        b_pair = tl.load(p_pairs + o_pair, mask=m_t, other=0)
        b_row = b_pair // TOP_K
        b_x = tl.load(p_x + b_row[:, None] * stride_xt + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        p_rows = p_left + (b_row * stride_lt + b_pair % TOP_K * r)[:, None] + o_r[None, :]
        b_left = tl.load(p_rows, mask=m_t[:, None] & m_r[None, :], other=0.0)
        if p_seed is not None:
            b_x = tl.where(kept(row_keys(p_seed, b_row, stream), i_k * BLOCK_K, threshold, BLOCK_K), b_x, 0.0)
        b_w = dot_of_many(tl.trans(b_x), b_left, b_w)
    if p_seed is not None:
        b_w *= keep_scale
    o_out = i_s.to(tl.int64) * E * r * K + (i_e * r + o_r).to(tl.int64)[None, :] * stride_op
    o_out += o_k.to(tl.int64)[:, None] * stride_ok
    tl.store(p_partials + o_out, b_w, mask=m_k[:, None] & m_r[None, :])


def forward(
    x_TK: Tensor,
    weights_NK: list[Tensor],
    biases_N: list[Tensor],
    lora_a_RK: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    top_k: int,
) -> tuple[list[Tensor], Tensor]:
    """One (T, N) output per projection, and the ungated compact shrink (T, C) that backward needs."""
    assert gates_THE is not None, "plain LoRA is dense"
    if x_TK.dtype == torch.float64:  # tensor cores stop at fp32; fp64 is for checking gradients
        return portable_grouped.forward(
            x_TK, weights_NK, biases_N, lora_a_RK, lora_b_NR, gates_THE, dropout_seed, scaling, dropout_p, stream,
            top_k,
        )  # fmt: skip
    x_TK = rows_contiguous(x_TK)
    sets = sets_of_all(gates_THE, top_k, x_TK.dtype)
    adapters = joined([[t] for t in (*lora_a_RK, *lora_b_NR)], [x_TK.dtype] * (2 * len(lora_b_NR)))
    lora_a_RK, lora_b_NR = adapters[: len(lora_a_RK)], adapters[len(lora_a_RK) :]
    s = shrink(x_TK, lora_a_RK, sets, dropout_seed, dropout_p, stream)
    gated = gating.gate(s, compact(gates_THE, sets), len(weights_NK), scaling)
    outputs = []
    for g, (weight, b, part) in enumerate(zip(weights_NK, lora_b_NR, gated.chunk(len(weights_NK), 1), strict=True)):
        y = x_TK.new_empty(x_TK.shape[0], weight.shape[0])
        bias = biases_N[g] if biases_N else None
        _expand(part, b.T, _of(sets, g), y, bias=bias)
        outputs.append(y.addmm_(x_TK, weight.T))
    return outputs, s


def backward(
    dys_TN: list[Tensor],
    x_TK: Tensor,
    weights_NK: list[Tensor],
    lora_a_RK: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    s_TC: Tensor,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    need_dx: bool,
    need_dlora: bool,
    need_dgates: bool,
    top_k: int,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """dx (T, K), da (G * R, K), db (N, R) per projection, dgates (T, H, E); whatever is not needed is empty."""
    assert gates_THE is not None, "plain LoRA is dense"
    if x_TK.dtype == torch.float64:  # as in forward
        return portable_grouped.backward(
            dys_TN, x_TK, weights_NK, lora_a_RK, lora_b_NR, gates_THE, s_TC, dropout_seed, scaling, dropout_p, stream,
            need_dx, need_dlora, need_dgates, top_k,
        )  # fmt: skip
    x_TK, dys_TN = rows_contiguous(x_TK), [rows_contiguous(dy) for dy in dys_TN]
    sets, drop = sets_of_all(gates_THE, top_k, x_TK.dtype), (dropout_seed, dropout_p, stream)
    dx, da = x_TK.new_empty(0), x_TK.new_empty(0)  # two: an operator's outputs may not share memory
    db: list[Tensor] = []

    adapters = joined([[t] for t in (*lora_a_RK, *lora_b_NR)], [x_TK.dtype] * (2 * len(lora_b_NR)))
    cast_a, cast_b = adapters[: len(lora_a_RK)], adapters[len(lora_a_RK) :]
    dgated = unexpand(dys_TN, cast_b, sets)
    ds, gated, dgates = gate_backward(
        dgated, s_TC, gates_THE, sets, len(dys_TN), scaling,
        need_ds=need_dx or need_dlora, need_gated=need_dlora, need_dgates=need_dgates,
    )  # fmt: skip
    if need_dlora:
        terms = [shrink_terms(x_TK, ds, sets, len(dys_TN), *drop)]
        terms += [[one] for one in expand_terms(dys_TN, gated, sets)]
        da, *db = totals(terms, [lora_a_RK[0].dtype, *(b.dtype for b in lora_b_NR)])
    if need_dx:
        dx = input_grad(ds, cast_a, sets, None, *drop)
        for dy, weight in zip(dys_TN, weights_NK, strict=True):
            dx.addmm_(dy, weight)
    return dx, da, db, dgates


def sets_of_all(gates_THE: Tensor, top_k: int, dtype: torch.dtype) -> list[Sets]:
    """The sets of each gate set, for x of this dtype."""
    return [sets_of(gates, top_k, tiles.set_rows(dtype)) for gates in gates_THE.float().unbind(1)]


def _of(sets: list[Sets], g: int) -> Sets:
    """Those of projection g: its own, or the ones that all share."""
    return sets[min(g, len(sets) - 1)]


def compact(gates_THE: Tensor, sets: list[Sets]) -> Tensor:
    """(T, H, k): the gates of the chosen experts."""
    return gates_THE.gather(2, torch.stack([one.chosen for one in sets], 1))


def shrink(
    x_TK: Tensor,
    lora_a_RK: list[Tensor],
    sets: list[Sets],
    dropout_seed: Tensor | None = None,
    dropout_p: float = 0.0,
    stream: int = 0,
) -> Tensor:
    """dropout(x) @ a^T of the chosen experts, (T, C), all in x's dtype."""
    s = _new_shrink(x_TK, lora_a_RK[0].shape[0], sets, len(lora_a_RK))
    for g, (a, part) in enumerate(zip(lora_a_RK, s.chunk(len(lora_a_RK), 1), strict=True)):
        _shrink(x_TK, a, _of(sets, g), part, dropout_seed, dropout_p, stream)
    return s


def unexpand(dys_TN: list[Tensor], lora_b_NR: list[Tensor], sets: list[Sets]) -> Tensor:
    """The gradient of the gated compact shrink, (T, C): dy_g @ B_g of the chosen experts, all in dy's dtype."""
    dgated = _new_shrink(dys_TN[0], lora_b_NR[0].shape[1], sets, len(dys_TN))
    for g, (dy, b, part) in enumerate(zip(dys_TN, lora_b_NR, dgated.chunk(len(dys_TN), 1), strict=True)):
        _shrink(dy, b.T, _of(sets, g), part)
    return dgated


def gate_backward(
    dgated_TC: Tensor,
    s_TC: Tensor,
    gates_THE: Tensor,
    sets: list[Sets],
    groups: int,
    scaling: float,
    *,
    need_ds: bool,
    need_gated: bool,
    need_dgates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``gating.gate_backward``, on compact columns; dgates (T, H, E) are zero where an expert was not chosen."""
    ds, gated, dgates = gating.gate_backward(
        dgated_TC, s_TC, compact(gates_THE, sets), groups, scaling,
        need_ds=need_ds, need_gated=need_gated, need_dgates=need_dgates,
    )  # fmt: skip
    if need_dgates:
        dgates = gates_THE.new_zeros(gates_THE.shape).scatter_(2, torch.stack([one.chosen for one in sets], 1), dgates)
    return ds, gated, dgates


def input_grad(
    ds_TC: Tensor,
    lora_a_RK: list[Tensor],
    sets: list[Sets],
    dx_TK: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
    stream: int,
) -> Tensor:
    """dropout(ds @ a) over the chosen experts of all projections, added to ``dx`` in place where it is given; all in
    one dtype."""
    add = dx_TK is not None
    dx = ds_TC.new_empty(ds_TC.shape[0], lora_a_RK[0].shape[1]) if dx_TK is None else dx_TK
    for g, (a, part) in enumerate(zip(lora_a_RK, ds_TC.chunk(len(lora_a_RK), 1), strict=True)):
        drop = (dropout_seed, dropout_p, stream)
        _expand(part, a, _of(sets, g), dx, add=add or g > 0, drop=drop)
    return dx


def shrink_terms(
    x_TK: Tensor,
    ds_TC: Tensor,
    sets: list[Sets],
    groups: int,
    dropout_seed: Tensor | None,
    dropout_p: float,
    stream: int,
) -> list[Tensor]:
    """Of each projection the terms (splits, R, K) of da_g = ds_g^T @ dropout(x)."""
    drop = (dropout_seed, dropout_p, stream)
    return [_weight_terms(x_TK, part, _of(sets, g), drop) for g, part in enumerate(ds_TC.chunk(groups, 1))]


def expand_terms(dys_TN: list[Tensor], gated_TC: Tensor, sets: list[Sets]) -> list[Tensor]:
    """Of each projection the terms (splits, N, R) of db_g = dy_g^T @ gated_g."""
    parts = gated_TC.chunk(len(dys_TN), 1)
    return [
        _weight_terms(dy, part, _of(sets, g), transposed=True)
        for g, (dy, part) in enumerate(zip(dys_TN, parts, strict=True))
    ]


def _new_shrink(like: Tensor, R: int, sets: list[Sets], groups: int) -> Tensor:
    T, k = sets[0].chosen.shape
    return like.new_empty(T, groups * k * (R // sets[0].slots.shape[1]))


def _shrink(
    x_TK: Tensor,
    a_RK: Tensor,
    sets: Sets,
    s: Tensor,
    dropout_seed: Tensor | None = None,
    dropout_p: float = 0.0,
    stream: int = 0,
) -> None:
    """Into s (T, k * r), whose rows may be apart; a may have any strides."""
    (T, K), (k, E) = x_TK.shape, (sets.chosen.shape[1], sets.slots.shape[1])
    r = a_RK.shape[0] // E
    tile = tiles.set_shrink_tiles(r, k, x_TK.dtype, capability_of(x_TK.device))
    if not s.numel():
        return
    with launching_on(x_TK.device):
        set_shrink_kernel[(sets.counts.shape[0],)](
            x_TK, a_RK, dropout_seed if dropout_p else None, s, sets.order, sets.slots, sets.experts, sets.counts,
            T, K, E, r, x_TK.stride(0), s.stride(0), *a_RK.stride(),
            stream, dropout.threshold(dropout_p), dropout.survivor_scale(dropout_p),
            SLOTS=tiles.slots_of(r, k, x_TK.dtype), BLOCK_T=tile.block_t, BLOCK_R=tiles.block_r(r, x_TK.dtype),
            BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _expand(
    s: Tensor,
    b_RN: Tensor,
    sets: Sets,
    y_TN: Tensor,
    *,
    bias: Tensor | None = None,
    add: bool = False,
    drop: tuple[Tensor | None, float, int] = (None, 0.0, 0),
) -> None:
    """Into or onto y, from s (T, k * r), whose rows may be apart; b may have any strides."""
    (T, N), (k, E) = y_TN.shape, (sets.chosen.shape[1], sets.slots.shape[1])
    r = b_RN.shape[0] // E
    seed, p, stream = drop
    tile = tiles.set_expand_tiles(r, k, y_TN.dtype, capability_of(y_TN.device))
    if not y_TN.numel():
        return
    bias = None if bias is None else bias.contiguous()
    with launching_on(y_TN.device):
        set_expand_kernel[(cdiv(N, tile.block_n) * sets.counts.shape[0],)](
            s, b_RN, bias, seed if p else None, y_TN, sets.order, sets.slots, sets.experts, sets.counts,
            T, N, E, r, s.stride(0), *b_RN.stride(), stream, dropout.threshold(p), dropout.survivor_scale(p),
            ADD=add, SLOTS=tiles.slots_of(r, k, y_TN.dtype), BLOCK_T=tile.block_t, BLOCK_R=tiles.block_r(r, y_TN.dtype),
            BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _weight_terms(
    x_TK: Tensor,
    left: Tensor,
    sets: Sets,
    drop: tuple[Tensor | None, float, int] = (None, 0.0, 0),
    *,
    transposed: bool = False,
) -> Tensor:
    """The terms of each expert's left^T @ dropout(x), (splits, R, K) or ``transposed`` (splits, K, R), fp32, from left
    (T, k * r).

    Their sum is bitwise the same on every run: terms are over runs that the choices alone decide.
    """
    (T, K), (k, E) = x_TK.shape, (sets.chosen.shape[1], sets.slots.shape[1])
    r = left.shape[1] // k
    seed, p, stream = drop
    tile = tiles.expert_weight_tiles(r, x_TK.dtype, capability_of(x_TK.device))
    splits = tiles.expert_splits(T * k // E, E * r, K, tile)
    pairs, starts = sets.by_expert
    shape, strides = ((splits, K, E * r), (1, E * r)) if transposed else ((splits, E * r, K), (K, 1))
    partials = x_TK.new_empty(shape, dtype=torch.float32)
    with launching_on(x_TK.device):
        expert_weight_kernel[(E * cdiv(r, tile.block_n), cdiv(K, tile.block_k), splits)](
            left, x_TK, seed if p else None, partials, pairs, starts,
            K, E, r, left.stride(0), x_TK.stride(0), *strides,
            stream, dropout.threshold(p), dropout.survivor_scale(p),
            TOP_K=k, SPLITS=splits, BLOCK_T=tile.block_t, BLOCK_R=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return partials


COMPILED = ((8, 1, 16), (32, 2, 32), (64, 8, 64))
"""(E, k, r) of the compile matrix: one pass of the fewest columns, of the usual ones, and of the most."""


def compile_cases(capability: Capability) -> Iterator[Case]:
    for (E, k, r), dtype, has_dropout in itertools.product(COMPILED, DTYPES, (True, False)):
        label = f"{short(dtype)} E={E} k={k} r={r}{' dropout' if has_dropout else ''}"
        pointers: dict[str, torch.dtype] = {"p_seed": torch.int64} if has_dropout else {}
        absent: dict[str, Any] = {} if has_dropout else {"p_seed": None}
        sets = dict(p_order=torch.int64, p_slots=torch.int8, p_experts=torch.int32, p_counts=torch.int32)
        scalars = dict(T=8192, K=3072, N=3072, E=E, r=r, stream=0, threshold=5243, keep_scale=1.087)
        blocks = dict(SLOTS=tiles.slots_of(r, k, dtype), BLOCK_R=tiles.block_r(r, dtype))
        # over A (E r, K) or, without dropout, over B's transpose (E r, N)
        for what, strides in (("A", (3072, 1)), ("B", (1, E * r)))[: 1 if has_dropout else 2]:
            tile = tiles.set_shrink_tiles(r, k, dtype, capability)
            yield Case(
                kernel=set_shrink_kernel,
                label=f"{label} {what}",
                pointers=pointers | sets | dict.fromkeys(("p_x", "p_a", "p_s"), dtype),
                scalars=scalars | dict(stride_xt=3072, stride_st=k * r, stride_ap=strides[0], stride_ak=strides[1]),
                constants=absent | blocks | dict(BLOCK_T=tile.block_t, BLOCK_K=tile.block_k),
                tiles=tile,
                tensor_cores=dtype != torch.float32,
            )
            tile = tiles.set_expand_tiles(r, k, dtype, capability)
            bias = {} if what == "A" else {"p_bias": dtype}
            yield Case(
                kernel=set_expand_kernel,
                label=f"{label} {what}",
                pointers=pointers | sets | bias | dict.fromkeys(("p_s", "p_b", "p_y"), dtype),
                scalars=scalars | dict(stride_st=k * r, stride_bp=strides[0], stride_bn=strides[1]),
                constants=absent | ({} if bias else {"p_bias": None}) | blocks
                | dict(ADD=what == "A", BLOCK_T=tile.block_t, BLOCK_N=tile.block_n),
                tiles=tile,
                tensor_cores=dtype != torch.float32,
            )  # fmt: skip
            tile = tiles.expert_weight_tiles(r, dtype, capability)
            out = dict(stride_op=3072, stride_ok=1) if what == "A" else dict(stride_op=1, stride_ok=E * r)
            yield Case(
                kernel=expert_weight_kernel,
                label=f"{label} d{what}",
                pointers=pointers | dict(p_left=dtype, p_x=dtype, p_partials=torch.float32)
                | dict(p_pairs=torch.int64, p_starts=torch.int64),
                scalars=scalars | dict(stride_lt=k * r, stride_xt=3072) | out,
                constants=absent | dict(TOP_K=k, SPLITS=2, BLOCK_T=tile.block_t, BLOCK_R=tile.block_n)
                | dict(BLOCK_K=tile.block_k),
                tiles=tile,
                tensor_cores=dtype != torch.float32,
            )  # fmt: skip
