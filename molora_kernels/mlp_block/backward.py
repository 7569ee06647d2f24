"""Backward of the SwiGLU block on the GPU: down, SwiGLU with its forward recomputed, then gate and up together.

Shape letters: T tokens, K hidden features, I intermediate features, H routers, E experts, P = G * R columns of the
shrink of G projections.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps nor that constexpr takes an int.)
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels import dropout
from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.dot import dot, dot_by_fp32
from molora_kernels._triton.dropout import kept, row_keys
from molora_kernels._triton.tiles import Capability, Tiles, capability_of, launching_on, next_power_of_2
from molora_kernels.grouped_lora import backward as grouped_lora
from molora_kernels.grouped_lora import gating, grouped, tiles
from molora_kernels.grouped_lora.forward import cast_together, rows_contiguous
from molora_kernels.grouped_lora.sets import Sets
from molora_kernels.mlp_block import portable
from molora_kernels.mlp_block.forward import BLOCK, TILES
from molora_kernels.router.backward import dlogits_of
from molora_kernels.router.forward import flags, fp32


@triton.jit
def swiglu_bwd_kernel(p_gate, p_up, p_dh, p_h, p_dgate, p_dup, n, BLOCK: tl.constexpr):
    """dgate and dup from dh, and h again where it is asked for, elementwise over n. dup may be dh's own memory: each
    element is read before it is written, by one thread."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_gate = tl.load(p_gate + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_dh = tl.load(p_dh + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    if p_h is not None:
        tl.store(p_h + o_n, (b_silu * b_up).to(p_h.dtype.element_ty), mask=m_n)
    b_dgate = b_dh * b_up * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    tl.store(p_dgate + o_n, b_dgate.to(p_dgate.dtype.element_ty), mask=m_n)
    tl.store(p_dup + o_n, (b_dh * b_silu).to(p_dup.dtype.element_ty), mask=m_n)


@triton.jit
def swiglu_weights_bwd_kernel(
    p_gate,
    p_up,
    p_dh,
    p_gated,
    p_ds,
    p_dlogits,
    p_seed,
    p_dgate,
    p_dup,
    p_db,
    p_da,
    p_router,
    T,
    N,
    R,
    Q,
    stream,
    threshold,
    keep_scale,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """dgate and dup (T, N) from dh, as ``swiglu_bwd_kernel``; and while they are at hand, the weight gradients that
    they and h enter, in terms over fixed runs of rows: db (SPLITS, 2, N, R) = [dgate, dup]^T @ gated (T, 2 R) of gate
    and up, da (SPLITS, R, N) = ds (T, R)^T @ dropout(h) of down, and that of down's router, (SPLITS, Q, N) =
    dlogits (T, Q)^T @ h. So h is never written, and dgate and dup are not read again for db. dup may be dh's own
    memory."""
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_I + tl.arange(0, BLOCK_I)
    o_r, o_q = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_Q)
    m_n, m_r, m_q = o_n < N, o_r < R, o_q < Q
    b_db_gate = tl.zeros([BLOCK_I, BLOCK_R], dtype=tl.float32)
    b_db_up = tl.zeros([BLOCK_I, BLOCK_R], dtype=tl.float32)
    b_da = tl.zeros([BLOCK_I, BLOCK_R], dtype=tl.float32)
    b_router = tl.zeros([BLOCK_I, BLOCK_Q], dtype=tl.float32)
    blocks = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLITS)
    for i_t in range(i_s * blocks, (i_s + 1) * blocks):
        o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t, o_row = o_t < T, o_t.to(tl.int64)
        o_in, m_in = o_row[:, None] * N + o_n[None, :], m_t[:, None] & m_n[None, :]
        m_left = m_t[:, None] & m_r[None, :]
        b_gate = tl.load(p_gate + o_in, mask=m_in, other=0.0).to(tl.float32)
        b_up = tl.load(p_up + o_in, mask=m_in, other=0.0).to(tl.float32)
        b_dh = tl.load(p_dh + o_in, mask=m_in, other=0.0).to(tl.float32)
        b_gated_gate = tl.load(p_gated + o_row[:, None] * (2 * R) + o_r[None, :], mask=m_left, other=0.0)
        b_gated_up = tl.load(p_gated + o_row[:, None] * (2 * R) + R + o_r[None, :], mask=m_left, other=0.0)
        b_ds = tl.load(p_ds + o_row[:, None] * R + o_r[None, :], mask=m_left, other=0.0)

        b_sigmoid = tl.sigmoid(b_gate)
        b_silu = b_gate * b_sigmoid
        b_dgate = (b_dh * b_up * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))).to(p_dgate.dtype.element_ty)
        b_dup = (b_dh * b_silu).to(p_dup.dtype.element_ty)
        b_h = (b_silu * b_up).to(p_gate.dtype.element_ty)
        tl.store(p_dgate + o_in, b_dgate, mask=m_in)
        tl.store(p_dup + o_in, b_dup, mask=m_in)

        b_db_gate = dot(tl.trans(b_dgate), b_gated_gate, b_db_gate)
        b_db_up = dot(tl.trans(b_dup), b_gated_up, b_db_up)
        if p_dlogits is not None:
            b_dlogits = tl.load(
                p_dlogits + o_row[:, None] * Q + o_q[None, :], mask=m_t[:, None] & m_q[None, :], other=0.0
            )
            b_router = dot_by_fp32(tl.trans(b_h), b_dlogits, b_router)
        if p_seed is not None:
            b_h = tl.where(kept(row_keys(p_seed, o_t, stream), i_n * BLOCK_I, threshold, BLOCK_I), b_h, 0.0)
        b_da = dot(tl.trans(b_h), b_ds, b_da)

    if p_seed is not None:
        b_da *= keep_scale
    o_split, o_column = i_s.to(tl.int64), o_n.to(tl.int64)
    m_out = m_n[:, None] & m_r[None, :]
    o_db = (2 * o_split * N + o_column)[:, None] * R + o_r[None, :]
    tl.store(p_db + o_db, b_db_gate, mask=m_out)
    tl.store(p_db + o_db + N * R, b_db_up, mask=m_out)
    tl.store(p_da + (o_split * R + o_r)[None, :] * N + o_column[:, None], b_da, mask=m_out)
    if p_dlogits is not None:
        p_out = p_router + (o_split * Q + o_q)[None, :] * N + o_column[:, None]
        tl.store(p_out, b_router, mask=m_n[:, None] & m_q[None, :])


def backward(
    dy_TK: Tensor,
    dsums: Tensor | None,
    x_TK: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    router_weights: list[Tensor],
    saved: list[Tensor],
    mask_T: Tensor | None,
    dropout_seed: Tensor | None,
    top_k: int,
    scaling: float,
    dropout_p: float,
    need_dx: bool,
    need_dlora: bool,
    need_drouter: bool,
    form: str = "dense",
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """dx, da, db (3 each), drouter_weights and drouter_biases (one per router); what is not needed is empty."""
    if x_TK.dtype == torch.float64:  # as in forward
        return portable.backward(
            dy_TK, dsums, x_TK, weights, lora_a, lora_b, router_weights, saved, mask_T, dropout_seed,
            top_k, scaling, dropout_p, need_dx, need_dlora, need_drouter, form,
        )  # fmt: skip
    h_gate, h_up, s_in, s_down, *routed = saved
    gates_in, logits_in, gates_down, logits_down = (t if t.ndim == 3 else None for t in routed)
    routers, own_router = len(router_weights), len(router_weights) == 3
    need_drouter = need_drouter and bool(routers)
    # Experts of gate and up train through down's router too, so frozen routers do not spare their logits' gradient.
    need_dlogits = bool(routers) and (need_dx or need_drouter or need_dlora)
    x_TK, dy_TK, mask = rows_contiguous(x_TK), rows_contiguous(dy_TK), flags(mask_T)
    dsums = fp32(dsums)

    def given(t: Tensor, needed: bool = True) -> Tensor | None:
        """As (T, columns), or None for the empty tensor that says "not needed"."""
        return t.flatten(1) if needed and t.ndim > 1 else None

    a_in, a_down, *b = cast_together([lora_a[:2], lora_a[2:], *([b] for b in lora_b)], x_TK.dtype)

    def adapter(part: slice, stream: int, gates: Tensor | None) -> _Adapter:
        sets = [] if form == "dense" or gates is None else grouped.sets_of_all(gates, top_k, x_TK.dtype)
        routers = torch.cat(router_weights[part]).float() if router_weights[part] else None
        return _Adapter(
            a_in if stream == 0 else a_down, b[part], lora_a[part], lora_b[part], routers, gates, sets, scaling,
            (dropout_seed, dropout_p, stream),
        )  # fmt: skip

    def router_grads(logits: Tensor | None, more: Tensor | None, part: slice) -> gating.RouterGrads | None:
        if logits is None:
            return None
        return gating.RouterGrads(logits, more, None if dsums is None else dsums[part], mask, top_k)

    # down, whose input gradient everything below needs
    part = slice(2, 3)
    down = adapter(part, 1, gates_down if own_router else gates_in)
    ds, gated, dlogits_down = down.through_gates(
        [dy_TK], s_down, router_grads(logits_down, None, part),
        need_ds=True, need_gated=need_dlora, need_dgates=need_dlogits,
    )  # fmt: skip
    own_dlogits = given(dlogits_down, own_router)
    dh = down.input_grad(ds, own_dlogits)
    dh.addmm_(dy_TK, weights[2])
    db_down = down.db([dy_TK], gated)
    own_dlogits = own_dlogits if need_drouter else None

    # SwiGLU, and gate and up
    part = slice(0, 2)
    gate_up = adapter(part, 0, gates_in)
    tile = None
    if need_dlora and not down.sets:
        tile = swiglu_weights_tiles(ds.shape[1], own_dlogits, x_TK.dtype, capability_of(x_TK.device))
    if tile:
        gated = gating.gate(s_in, gates_in, 2, scaling)
        dh_gate, dh_up, dbs, da, drouter_down = swiglu_weights_backward(
            h_gate, h_up, dh, gated, ds, own_dlogits, *down.drop, tile
        )
        db_in = [d.sum(0).to(one.dtype) for d, one in zip(dbs.unbind(1), lora_b[:2], strict=True)]
        da_down = [da.sum(0).to(lora_a[2].dtype)]
    else:
        h, dh_gate, dh_up = swiglu_backward(h_gate, h_up, dh, need_h=need_dlora or own_dlogits is not None)
        da_down, drouter_down = down.da(h, given(ds, need_dlora), own_dlogits)
        db_in = None
    more = None if own_router or not need_dlogits else dlogits_down  # a shared router's gates: down's share
    ds, gated, dlogits_in = gate_up.through_gates(
        [dh_gate, dh_up], s_in, router_grads(logits_in, more, part),
        need_ds=need_dx or need_dlora, need_gated=need_dlora and db_in is None, need_dgates=need_dlogits,
    )  # fmt: skip
    db_in = gate_up.db([dh_gate, dh_up], gated) if db_in is None else db_in
    da_in, drouter_in = gate_up.da(x_TK, given(ds, need_dlora), given(dlogits_in, need_drouter))
    dx = x_TK.new_empty(0)
    if need_dx:
        dx = gate_up.input_grad(ds, given(dlogits_in))
        dx.addmm_(dh_gate, weights[0]).addmm_(dh_up, weights[1])

    da, db = [*da_in, *da_down], [*db_in, *db_down]
    if not need_drouter:
        return dx, da, db, [], []
    dlogits = [*dlogits_in.unbind(1), *(dlogits_down.unbind(1) if own_router else ())]
    drouters = [*drouter_in.chunk(min(routers, 2), 1), *((drouter_down,) if own_router else ())]
    return dx, da, db, [d.sum(0) for d in drouters], [d.sum(0) for d in dlogits]


class _Adapter(NamedTuple):
    """Experts and routers of the projections that read one input, in the form that forward ran."""

    a: Tensor
    """(P, K) in the input's dtype"""
    b: list[Tensor]
    """(N, R) in the input's dtype"""
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    """The masters, whose dtypes their gradients have."""
    routers: Tensor | None
    """(H * E, K) fp32, where they have their own"""
    gates: Tensor | None
    sets: list[Sets]
    """Of the grouped form; none in the dense one."""
    scaling: float
    drop: tuple[Tensor | None, float, int]

    def through_gates(
        self, dys: list[Tensor], s: Tensor, router: gating.RouterGrads | None, **need: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ds, the gated shrink, and dlogits, or dgates where the router is another's; see ``gating.gate_backward``."""
        settings = (len(dys), self.scaling)
        if not self.sets or self.gates is None:
            dgated = grouped_lora.unexpand(dys, self.b, s)
            return gating.gate_backward(dgated, s, self.gates, *settings, router=router, **need)
        dgated = grouped.unexpand(dys, self.b, self.sets)
        ds, gated, dgates = grouped.gate_backward(dgated, s, self.gates, self.sets, *settings, **need)
        if router and need["need_dgates"]:
            dgates = dgates if router.more_dgates is None else dgates + router.more_dgates
            dgates = dlogits_of(dgates, router.dsums, router.logits, self.gates, router.mask, router.top_k)
        return ds, gated, dgates

    def input_grad(self, ds: Tensor, dlogits: Tensor | None) -> Tensor:
        """What experts and routers contribute to the input's gradient."""
        routers = None if dlogits is None else self.routers
        if not self.sets:
            return grouped_lora.input_grad(ds, self.a, dlogits, routers, *self.drop)
        dx = None
        if routers is not None:  # a product with no experts: the routers' alone
            dx = grouped_lora.input_grad(ds[:, :0], self.a[:0], dlogits, routers, None, 0.0, 0)
        return grouped.input_grad(ds, list(self.a.chunk(len(self.lora_a))), self.sets, dx, *self.drop)

    def da(self, x: Tensor, ds: Tensor | None, dlogits: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """da per projection, in its own dtype, if ds is given; if dlogits, the terms of the routers' (splits, H * E, K)
        fp32."""
        if ds is None or not self.sets:
            partials, router_partials = grouped_lora.weight_partials(x, ds, dlogits, *self.drop)
            parts = [] if ds is None else zip(partials.chunk(len(self.lora_a), 1), self.lora_a, strict=True)
            return [part.sum(0).to(a.dtype) for part, a in parts], router_partials
        das = grouped.shrink_grads(x, ds, self.lora_a, self.sets, *self.drop)
        return das, grouped_lora.weight_partials(x, None, dlogits)[1]

    def db(self, dys: list[Tensor], gated: Tensor) -> list[Tensor]:
        """db per projection, in its own dtype; none if ``gated`` is empty."""
        if not gated.ndim > 1:
            return []
        if not self.sets:
            return grouped_lora.expand_grads(dys, gated, self.lora_b)
        return grouped.expand_grads(dys, gated, self.lora_b, self.sets)


def swiglu_backward(h_gate: Tensor, h_up: Tensor, dh: Tensor, *, need_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h (empty if not needed), dh_gate, dh_up; dh_up takes dh's memory."""
    h = torch.empty_like(dh) if need_h else None
    dh_gate, n = torch.empty_like(dh), dh.numel()
    if n:
        with launching_on(dh.device):
            swiglu_bwd_kernel[(triton.cdiv(n, BLOCK),)](
                h_gate, h_up, dh, h, dh_gate, dh, n, BLOCK=BLOCK, num_warps=TILES.num_warps
            )
    return dh.new_empty(0, 0) if h is None else h, dh_gate, dh


def swiglu_weights_backward(
    h_gate: Tensor,
    h_up: Tensor,
    dh: Tensor,
    gated: Tensor,
    ds: Tensor,
    dlogits: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
    stream: int,
    tile: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh_gate, dh_up, which takes dh's memory; and the terms, over fixed runs of rows, of gate's and up's db (splits,
    2, I, R), of down's da (splits, R, I) and of its router's gradient (splits, Q, I); fp32."""
    (T, inner), R, Q = dh.shape, ds.shape[1], 0 if dlogits is None else dlogits.shape[1]
    splits = tiles.weight_splits(T, R, inner, tile)
    dh_gate = torch.empty_like(dh)
    dbs, da, drouter = (
        dh.new_empty(splits, *size, dtype=torch.float32) for size in ((2, inner, R), (R, inner), (Q, inner))
    )
    with launching_on(dh.device):
        swiglu_weights_bwd_kernel[(triton.cdiv(inner, tile.block_k), splits)](
            h_gate, h_up, dh, gated, ds, dlogits, dropout_seed if dropout_p else None,
            dh_gate, dh, dbs, da, drouter,
            T, inner, R, Q, stream, dropout.threshold(dropout_p), dropout.survivor_scale(dropout_p),
            SPLITS=splits, BLOCK_T=tile.block_t, BLOCK_I=tile.block_k, BLOCK_R=tile.block_n,
            BLOCK_Q=tiles.padded_logits(Q), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dh_gate, dh, dbs, da, drouter


def swiglu_weights_tiles(R: int, dlogits: Tensor | None, dtype: torch.dtype, capability: Capability) -> Tiles | None:
    """``block_t`` tokens at a time, ``block_k`` intermediate features, ``block_n`` columns of a shrink; None where
    three accumulators do not fit in registers, and where nobody measured that they pay."""
    Q = tiles.padded_logits(0 if dlogits is None else dlogits.shape[1])
    block_r = max(next_power_of_2(R), tiles.MIN_DOT)
    if capability != (9, 0) or dtype == torch.float32 or block_r > 128 or Q > tiles.MIN_DOT:
        return None
    return Tiles(block_t=32, block_k=64, block_n=block_r, num_warps=8, num_stages=3)


def compile_cases(_: Capability) -> Iterator[Case]:
    for dtype, need_h in itertools.product(DTYPES, (True, False)):
        yield Case(
            kernel=swiglu_bwd_kernel,
            label=f"{short(dtype)}{' h' if need_h else ''}",
            pointers=dict.fromkeys(("p_gate", "p_up", "p_dh", "p_dgate", "p_dup", *(["p_h"] if need_h else [])), dtype),
            scalars={"n": 8192 * 8192},
            constants={"BLOCK": BLOCK} | ({} if need_h else {"p_h": None}),
            tiles=TILES,
            tensor_cores=False,
        )
