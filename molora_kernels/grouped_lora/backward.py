"""Backward on the GPU: weight gradients (K4, K5) and input gradient (K6); the gates' part (K3) is ``gating.py``.

Shape letters: T tokens, K input features, N output features, G projections that read the same input, E experts,
r rank of one expert, R = E * r, P = G * R columns of the shrink, H gate sets (G, or 1 shared by all projections).
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
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
from molora_kernels._triton.dot import PLANES, dot, dot_by_fp32, dot_fp32_by_fp32, dot_in_steps, dot_of_many
from molora_kernels._triton.dropout import kept, row_keys
from molora_kernels._triton.pick import pick, pick_block
from molora_kernels._triton.tiles import Capability, capability_of, cdiv, launching_on
from molora_kernels._triton.total import joined, totals
from molora_kernels.grouped_lora import gating, portable, tiles
from molora_kernels.grouped_lora.forward import rows_contiguous


@triton.jit
def weight_bwd_kernel(
    p_left,
    p_dlogits,
    p_xs,
    p_seed,
    p_partials,
    p_router_partials,
    T,
    P,
    Q,
    Ks,
    stride_lt,
    strides_xt,
    scale,
    stream,
    threshold,
    TRANSPOSED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of each product g: partials_g (SPLITS, P, K_g), or TRANSPOSED (SPLITS, K_g, P), = scale * left_g (T, P)^T @
    dropout(x_g) (T, K_g), where left_g are the g-th P columns of left; and, of one product, router_partials
    (SPLITS, Q, K) = dlogits (T, Q)^T @ x: each split over its own run of rows, in one pass over x. dlogits are fp32, or
    three bf16 planes (3, T, Q) of it.

    Programs of the same columns of x are neighbours: they share x in the L2. With a router there is one block of P.
    Features are the rows of the product, whose fewest a wgmma takes is 64: P can be less.
    """
    i_p, i_s = tl.program_id(0), tl.program_id(2)
    i_g, i_k = pick_block(Ks, tl.program_id(1), BLOCK_K)
    p_x, K, stride_xt = pick(p_xs, i_g), pick(Ks, i_g), pick(strides_xt, i_g)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_q, o_plane = tl.arange(0, BLOCK_Q), tl.full([BLOCK_Q], 0, tl.int64)
    if p_dlogits is not None:  # noqa: SIM102 # triton evaluates both sides of "and", and None has no dtype
        if p_dlogits.dtype.element_ty == tl.bfloat16:
            o_q, o_plane = o_q % (BLOCK_Q // PLANES), (o_q // (BLOCK_Q // PLANES)).to(tl.int64)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_p, m_q, m_k = o_p < P, (o_q < Q) & (o_plane < 3), o_k < K

    b_w = tl.zeros([BLOCK_K, BLOCK_P], dtype=tl.float32)
    b_router = tl.zeros([BLOCK_K, BLOCK_Q], dtype=tl.float32)
    blocks = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLITS)
    for i_t in range(i_s * blocks, (i_s + 1) * blocks):
        o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        o_row = o_t.to(tl.int64)
        b_x = tl.load(p_x + o_row[:, None] * stride_xt + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        if p_dlogits is not None:
            p_rows = p_dlogits + (o_row[:, None] + (o_plane * T)[None, :]) * Q + o_q[None, :]
            b_dlogits = tl.load(p_rows, mask=m_t[:, None] & m_q[None, :], other=0.0)
            if p_dlogits.dtype.element_ty == tl.bfloat16:
                b_router = dot_in_steps(tl.trans(b_x), b_dlogits, b_router)
            else:
                b_router = dot_by_fp32(tl.trans(b_x), b_dlogits, b_router)
        if p_left is not None:
            p_rows = p_left + i_g * P + o_row[:, None] * stride_lt + o_p[None, :]
            b_left = tl.load(p_rows, mask=m_t[:, None] & m_p[None, :], other=0.0)
            if p_seed is not None:
                b_x = tl.where(kept(row_keys(p_seed, o_t, stream), i_k * BLOCK_K, threshold, BLOCK_K), b_x, 0.0)
            b_w = dot_of_many(tl.trans(b_x), b_left, b_w)

    o_split = i_s.to(tl.int64)
    if p_left is not None:
        o_out = o_split * P * K
        if TRANSPOSED:
            o_out += o_p[None, :] + o_k.to(tl.int64)[:, None] * P
        else:
            o_out += o_p.to(tl.int64)[None, :] * K + o_k[:, None]
        tl.store(pick(p_partials, i_g) + o_out, b_w * scale, mask=m_k[:, None] & m_p[None, :])
    if p_dlogits is not None:
        if p_dlogits.dtype.element_ty == tl.bfloat16:
            o_q = tl.arange(0, BLOCK_Q // PLANES)
            b_router = tl.sum(tl.reshape(b_router, (BLOCK_K, PLANES, BLOCK_Q // PLANES)), axis=1)
        o_out = (o_split * Q + o_q)[None, :] * K + o_k[:, None]
        tl.store(p_router_partials + o_out, b_router, mask=m_k[:, None] & (o_q < Q)[None, :])


@triton.jit
def input_bwd_kernel(
    p_ds,
    p_a,
    p_dlogits,
    p_router,
    p_seed,
    p_dx,
    T,
    P,
    Q,
    K,
    stream,
    threshold,
    keep_scale,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx (T, K) = dropout(ds (T, P) @ a (P, K)) + dlogits (T, Q) @ router (Q, K), both fp32 or three bf16 planes."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    i_k, i_t = tl.program_id(0) % blocks_k, tl.program_id(0) // blocks_k
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_t, m_k = o_t < T, o_k < K
    o_row = o_t.to(tl.int64)

    b_dx = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    for i_p in range(tl.cdiv(P, BLOCK_P)):
        o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
        m_p = o_p < P
        b_ds = tl.load(p_ds + o_row[:, None] * P + o_p[None, :], mask=m_t[:, None] & m_p[None, :], other=0.0)
        b_a = tl.load(p_a + o_p.to(tl.int64)[:, None] * K + o_k[None, :], mask=m_p[:, None] & m_k[None, :], other=0.0)
        b_dx = dot(b_ds, b_a, b_dx)
    if p_seed is not None:
        m_kept = kept(row_keys(p_seed, o_t, stream), i_k * BLOCK_K, threshold, BLOCK_K)
        b_dx = tl.where(m_kept, b_dx * keep_scale, 0.0)
    if p_dlogits is not None:
        if p_dlogits.dtype.element_ty == tl.bfloat16:
            # What a 16-bit result can show of a product of planes: high high, high middle and middle high.
            o_pair, o_q = tl.arange(0, BLOCK_Q) // (BLOCK_Q // PLANES), tl.arange(0, BLOCK_Q) % (BLOCK_Q // PLANES)
            m_q = (o_pair < 3) & (o_q < Q)
            o_left, o_right = (o_pair == 2).to(tl.int64) * T, (o_pair == 1).to(tl.int64) * Q
            p_rows = p_dlogits + (o_row[:, None] + o_left[None, :]) * Q + o_q[None, :]
            b_dlogits = tl.load(p_rows, mask=m_t[:, None] & m_q[None, :], other=0.0)
            p_rows = p_router + (o_right + o_q)[:, None] * K + o_k[None, :]
            b_router = tl.load(p_rows, mask=m_q[:, None] & m_k[None, :], other=0.0)
            b_dx = dot(b_dlogits, b_router, b_dx)
        else:
            # Not pipelined: on sm_100 Triton 3.9 lets the operands of the next step overwrite those of three products
            # through one accumulator, of which it has waited for two.
            for i_q in tl.range(tl.cdiv(Q, BLOCK_Q), num_stages=1):
                o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
                m_q = o_q < Q
                p_rows = p_dlogits + o_row[:, None] * Q + o_q[None, :]
                b_dlogits = tl.load(p_rows, mask=m_t[:, None] & m_q[None, :], other=0.0)
                p_rows = p_router + o_q.to(tl.int64)[:, None] * K + o_k[None, :]
                b_router = tl.load(p_rows, mask=m_q[:, None] & m_k[None, :], other=0.0)
                b_dx = dot_fp32_by_fp32(b_dlogits, b_router, b_dx, p_dx.dtype.element_ty)
    tl.store(p_dx + o_row[:, None] * K + o_k[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_t[:, None] & m_k[None, :])


def backward(
    dys_TN: list[Tensor],
    x_TK: Tensor,
    weights_NK: list[Tensor],
    lora_a_RK: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    s_TP: Tensor,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    need_dx: bool,
    need_dlora: bool,
    need_dgates: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """dx (T, K), da (P, K), db (N, R) per projection, dgates (T, H, E); whatever is not needed has zero elements."""
    if x_TK.dtype == torch.float64:  # as in forward
        return portable.backward(
            dys_TN, x_TK, weights_NK, lora_a_RK, lora_b_NR, gates_THE, s_TP, dropout_seed, scaling, dropout_p, stream,
            need_dx, need_dlora, need_dgates,
        )  # fmt: skip
    x_TK, dys_TN = rows_contiguous(x_TK), [rows_contiguous(dy) for dy in dys_TN]
    drop = (dropout_seed, dropout_p, stream)
    dx, da = x_TK.new_empty(0), x_TK.new_empty(0)  # two: an operator's outputs may not share memory
    db: list[Tensor] = []

    a_PK, *cast_b = joined([lora_a_RK, *([b] for b in lora_b_NR)], [x_TK.dtype] * (1 + len(lora_b_NR)))
    if gates_THE is None:
        ds, gated, dgates = unexpand(dys_TN, cast_b, s_TP, scaling), s_TP, x_TK.new_empty(0)
    else:
        ds, gated, dgates = gating.gate_backward(
            unexpand(dys_TN, cast_b, s_TP), s_TP, gates_THE, len(dys_TN), scaling,
            need_ds=need_dx or need_dlora, need_gated=need_dlora, need_dgates=need_dgates,
        )  # fmt: skip
    if need_dlora:
        terms = [weight_terms(x_TK, ds, None, *drop)[0]]
        terms += expand_terms(dys_TN, gated, scaling if gates_THE is None else 1.0)
        da, *db = totals([[one] for one in terms], [lora_a_RK[0].dtype, *(b.dtype for b in lora_b_NR)])
    if need_dx:
        dx = input_grad(ds, a_PK, None, None, *drop)
        for dy, weight in zip(dys_TN, weights_NK, strict=bool(weights_NK)):
            dx.addmm_(dy, weight)
    return dx, da, db, dgates


def unexpand(dys_TN: list[Tensor], lora_b_NR: list[Tensor], s_TP: Tensor, scaling: float = 1.0) -> Tensor:
    """scaling * dy_g @ B_g side by side, (T, P): the gradient of the gated shrink, all in dy's dtype."""
    dgated = torch.empty_like(s_TP)
    for dy, b, part in zip(dys_TN, lora_b_NR, dgated.chunk(len(dys_TN), 1), strict=True):
        part.addmm_(dy, b, beta=0, alpha=scaling)
    return dgated


def expand_terms(dys_TN: list[Tensor], gated_TP: Tensor, scaling: float = 1.0) -> list[Tensor]:
    """The terms (splits, N, R) of scaling * dy_g^T @ gated_g, of all projections by one launch."""
    return _weight_terms(dys_TN, gated_TP, None, (None, 0.0, 0), scaling, transposed=True)[0]


def weight_terms(
    x_TK: Tensor,
    left_TP: Tensor | None,
    dlogits_TQ: Tensor | None,
    dropout_seed: Tensor | None = None,
    dropout_p: float = 0.0,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """The terms, over fixed runs of rows, of left^T @ dropout(x), (splits, P, K), and of dlogits^T @ x, (splits, Q, K);
    fp32, empty where not given. dlogits are fp32, or the planes of it where ``tiles.as_planes``.

    Their sum is bitwise the same on every run. Who wants the gradients of several projections apart adds their terms up
    apart, and copies nothing.
    """
    if left_TP is None and dlogits_TQ is None:
        return x_TK.new_empty(1, 0), x_TK.new_empty(1, 0)
    drop = (dropout_seed, dropout_p, stream)
    if left_TP is None or dlogits_TQ is None or tiles.rides_along(left_TP.shape[1], dlogits_TQ.shape[-1], x_TK.dtype):
        terms, router_terms = _weight_terms([x_TK], left_TP, dlogits_TQ, drop)
        return terms[0], router_terms
    return _weight_terms([x_TK], left_TP, None, drop)[0][0], _weight_terms([x_TK], None, dlogits_TQ, drop)[1]


def _weight_terms(
    xs: list[Tensor],
    left_TP: Tensor | None,
    dlogits_TQ: Tensor | None,
    drop: tuple[Tensor | None, float, int],
    scaling: float = 1.0,
    *,
    transposed: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """As :func:`weight_terms`, of several x (T, K_g), each with its own columns of ``left``."""
    (seed, p, stream), x = drop, xs[0]
    T, Ks = x.shape[0], tuple(each.shape[1] for each in xs)
    P, Q = 0 if left_TP is None else left_TP.shape[1] // len(xs), 0 if dlogits_TQ is None else dlogits_TQ.shape[-1]
    assert dlogits_TQ is None or (dlogits_TQ.ndim == 3) == tiles.as_planes(Q, x.dtype)
    q_padded = tiles.padded_logits(Q, x.dtype)
    tile = tiles.weight_tiles(P, q_padded if Q else 0, x.dtype, capability_of(x.device))
    splits = tiles.weight_splits(T, P, sum(Ks), tile)
    terms = [x.new_empty((splits, K, P) if transposed else (splits, P, K), dtype=torch.float32) for K in Ks]
    router_terms = x.new_empty(splits, Q, Ks[0], dtype=torch.float32)
    with launching_on(x.device):
        weight_bwd_kernel[(cdiv(max(P, 1), tile.block_n), sum(cdiv(K, tile.block_k) for K in Ks), splits)](
            left_TP, dlogits_TQ, tuple(xs), seed if p else None, tuple(terms), router_terms,
            T, P, Q, Ks, 0 if left_TP is None else left_TP.stride(0), tuple(each.stride(0) for each in xs),
            scaling * dropout.survivor_scale(p), stream, dropout.threshold(p),
            TRANSPOSED=transposed, SPLITS=splits,
            BLOCK_T=tile.block_t, BLOCK_P=tile.block_n, BLOCK_Q=q_padded, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return terms, router_terms


def input_grad(
    ds_TP: Tensor,
    a_PK: Tensor,
    dlogits_TQ: Tensor | None,
    router_QK: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
    stream: int,
) -> Tensor:
    """dropout(ds @ a) + dlogits @ router, (T, K) in ds's dtype: what base projections then add to. dlogits and router
    are fp32, or both planes of it where ``tiles.as_planes``."""
    (T, P), K = ds_TP.shape, a_PK.shape[1]
    Q = 0 if dlogits_TQ is None else dlogits_TQ.shape[-1]
    as_planes = tiles.as_planes(Q, ds_TP.dtype)
    assert dlogits_TQ is None or (dlogits_TQ.ndim == 3) == as_planes
    q_padded = tiles.padded_logits(Q, ds_TP.dtype) if as_planes else tiles.MIN_DOT
    tile = tiles.input_tiles(P, ds_TP.dtype, capability_of(ds_TP.device), drops=dropout_p > 0)
    dx = ds_TP.new_empty(T, K)
    if not dx.numel():
        return dx
    with launching_on(ds_TP.device):
        input_bwd_kernel[(cdiv(K, tile.block_k) * cdiv(T, tile.block_t),)](
            ds_TP, a_PK, dlogits_TQ, router_QK, dropout_seed if dropout_p else None, dx, T, P, Q, K,
            stream, dropout.threshold(dropout_p), dropout.survivor_scale(dropout_p),
            BLOCK_T=tile.block_t, BLOCK_P=tile.block_n, BLOCK_Q=q_padded, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dx


def compile_cases(capability: Capability) -> Iterator[Case]:
    for (P, H, E), dtype, has_dropout in itertools.product(tiles.COMPILED, DTYPES, (True, False)):
        label = f"{short(dtype)} P={P} Q={H * E}{' dropout' if has_dropout else ''}"
        pointers: dict[str, torch.dtype] = {"p_seed": torch.int64} if has_dropout else {}
        absent: dict[str, Any] = {} if has_dropout else {"p_seed": None}
        scalars = dict(T=8192, P=P, Q=H * E, K=3072, stream=0, threshold=5243, keep_scale=1.087)
        as_planes = tiles.as_planes(H * E, dtype)
        router_dtype = torch.bfloat16 if as_planes else torch.float32
        dlogits: dict[str, torch.dtype] = {"p_dlogits": router_dtype} if H else {}

        yield from _weight_cases(P, H * E, dtype, capability, label, pointers, absent, scalars)
        tile = tiles.input_tiles(P, dtype, capability, drops=has_dropout)
        yield Case(
            kernel=input_bwd_kernel,
            label=label,
            pointers=pointers | dlogits | {"p_ds": dtype, "p_a": dtype, "p_dx": dtype}
            | ({"p_router": router_dtype} if H else {}),
            scalars=scalars,
            constants=absent | ({} if H else {"p_dlogits": None, "p_router": None})
            | dict(BLOCK_T=tile.block_t, BLOCK_P=tile.block_n, BLOCK_K=tile.block_k)
            | dict(BLOCK_Q=tiles.padded_logits(H * E, dtype) if H and as_planes else tiles.MIN_DOT),
            tiles=tile,
            tensor_cores=dtype != torch.float32,
        )  # fmt: skip


def _weight_cases(
    P: int,
    Q: int,
    dtype: torch.dtype,
    capability: Capability,
    label: str,
    pointers: dict[str, torch.dtype],
    absent: dict[str, Any],
    scalars: dict[str, Any],
) -> Iterator[Case]:
    """dA with the router's weights riding along where they do, else one after the other; dB, which is (N, R); and the
    router's alone, as in its warm-up."""
    together = bool(Q) and tiles.rides_along(P, Q, dtype)
    variants = [("dA and dW_r", P, Q, 1)] if together else [("dA", P, 0, 1)]
    variants += [(f"dB of {products}", P, 0, products) for products in (1, 2, 3) if "p_seed" in absent]
    variants += [("dW_r", 0, Q, 1)] if Q else []
    for what, p, q, products in variants:
        q_padded = tiles.padded_logits(q, dtype)
        tile = tiles.weight_tiles(p, q_padded if q else 0, dtype, capability)
        dlogits = torch.bfloat16 if tiles.as_planes(q, dtype) else torch.float32
        yield Case(
            kernel=weight_bwd_kernel,
            label=f"{label} {what}",
            pointers=pointers | {"p_xs": (dtype,) * products, "p_partials": (torch.float32,) * products}
            | {"p_router_partials": torch.float32}
            | ({"p_left": dtype} if p else {}) | ({"p_dlogits": dlogits} if q else {}),
            scalars=scalars | dict(P=p, Q=q, Ks=(3072,) * products, stride_lt=p * products, scale=2.0)
            | dict(strides_xt=(3072,) * products),
            constants=absent | ({} if p else {"p_left": None}) | ({} if q else {"p_dlogits": None})
            | dict(TRANSPOSED="dB" in what, SPLITS=tiles.weight_splits(8192, p, 3072 * products, tile))
            | dict(BLOCK_T=tile.block_t, BLOCK_P=tile.block_n, BLOCK_Q=q_padded, BLOCK_K=tile.block_k),
            tiles=tile,
            tensor_cores=dtype != torch.float32,
        )  # fmt: skip
