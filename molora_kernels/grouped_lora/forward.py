"""Forward on the GPU: shrink (K1) and expand (K2); the gates between them are ``gating.py``.

Shape letters: T tokens, K input features, N output features, G projections that read the same input, E experts,
r rank of one expert, R = E * r, P = G * R columns of the shrink, H gate sets (G, or 1 shared by all projections).
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
from molora_kernels._triton.dot import PLANES, dot_in_steps, dot_of_many
from molora_kernels._triton.dropout import kept, row_keys
from molora_kernels._triton.routing import choose, gates_of, softmax, sums_of
from molora_kernels._triton.tiles import Capability, capability_of, cdiv, launching_on
from molora_kernels._triton.total import joined
from molora_kernels.grouped_lora import gating, portable, tiles


@triton.jit
def shrink_fwd_kernel(
    p_x,
    p_a,
    p_seed,
    p_s,
    p_router,
    p_bias,
    p_selection,
    p_mask,
    p_gates,
    p_logits,
    p_partials,
    T,
    K,
    P,
    H,
    stride_xt,
    stream,
    threshold,
    keep_scale,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """s (T, P) = dropout(x) (T, K) @ a (P, K)^T and, with a router, gates and logits (T, H, E) of x itself and each
    row block's share of the routers' sums and counts (H, 1 + 2E), all in one pass over x.

    Programs of the same rows are neighbours: they share x in the L2. With a router there is one block of P.
    """
    blocks_p = tl.cdiv(P, BLOCK_P)
    i_p, i_t = tl.program_id(0) % blocks_p, tl.program_id(0) // blocks_p
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_t, m_p = o_t < T, o_p < P
    p_rows = p_x + o_t.to(tl.int64)[:, None] * stride_xt
    p_columns = p_a + o_p.to(tl.int64)[None, :] * K
    if p_seed is not None:
        b_keys = row_keys(p_seed, o_t, stream)
    if p_router is not None:
        # Column h * E_PAD + e of each plane is expert e of router h.
        o_q = tl.arange(0, PLANES * HEADS * E_PAD)
        o_plane, o_router, o_expert = o_q // (HEADS * E_PAD), o_q // E_PAD % HEADS, o_q % E_PAD
        m_q = (o_plane < 3) & (o_router < H) & (o_expert < E)
        p_router_columns = p_router + ((o_plane * H + o_router) * E + o_expert).to(tl.int64)[None, :] * K
        b_planes = tl.zeros([BLOCK_T, PLANES * HEADS * E_PAD], dtype=tl.float32)

    b_s = tl.zeros([BLOCK_T, BLOCK_P], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BLOCK_K)):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_x = tl.load(p_rows + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(p_columns + o_k[:, None], mask=m_k[:, None] & m_p[None, :], other=0.0)
        if p_router is not None:
            b_router = tl.load(p_router_columns + o_k[:, None], mask=m_k[:, None] & m_q[None, :], other=0.0)
            b_planes = dot_in_steps(b_x, b_router, b_planes)
        if p_seed is not None:
            b_x = tl.where(kept(b_keys, i_k * BLOCK_K, threshold, BLOCK_K), b_x, 0.0)
        b_s = dot_of_many(b_x, b_a, b_s)
    if p_seed is not None:
        b_s *= keep_scale
    p_out = p_s + o_t.to(tl.int64)[:, None] * P + o_p[None, :]
    tl.store(p_out, b_s.to(p_s.dtype.element_ty), mask=m_t[:, None] & m_p[None, :])

    if p_router is not None:
        o_row = tl.arange(0, BLOCK_T * HEADS)
        o_h, o_e = o_row % HEADS, tl.arange(0, E_PAD)
        o_token = i_t * BLOCK_T + o_row // HEADS
        m_row = (o_token < T) & (o_h < H)
        m_e = o_e < E
        m_routed = m_row[:, None] & m_e[None, :]
        o_routed = (o_token.to(tl.int64) * H + o_h)[:, None] * E + o_e[None, :]
        o_bias = o_h[:, None] * E + o_e[None, :]
        b_logits = tl.sum(tl.reshape(b_planes, (BLOCK_T, PLANES, HEADS * E_PAD)), axis=1)
        b_logits = tl.reshape(b_logits, (BLOCK_T * HEADS, E_PAD))
        if p_bias is not None:
            b_logits += tl.load(p_bias + o_bias, mask=m_routed, other=0.0)
        b_probs, b_lse = softmax(b_logits, E, E_PAD)
        b_scores = b_logits
        if p_selection is not None:
            b_scores = b_probs + tl.load(p_selection + o_bias, mask=m_routed, other=0.0)
        b_chosen = choose(b_scores, TOP_K, E, E_PAD)
        tl.store(p_gates + o_routed, gates_of(b_logits, b_probs, b_chosen, TOP_K), mask=m_routed)
        tl.store(p_logits + o_routed, b_logits, mask=m_routed)

        if p_mask is not None:
            m_row = m_row & (tl.load(p_mask + o_token, mask=m_row, other=0) != 0)
        b_z, b_prob_sums, b_counts = sums_of(b_probs, b_lse, b_chosen, m_row, HEADS, E_PAD)
        o_head = tl.arange(0, HEADS)
        m_head = (o_head < H)[:, None] & m_e[None, :]
        p_block = p_partials + (i_t.to(tl.int64) * H + o_head) * (1 + 2 * E)
        tl.store(p_block, b_z, mask=o_head < H)
        tl.store(p_block[:, None] + (1 + o_e)[None, :], b_prob_sums, mask=m_head)
        tl.store(p_block[:, None] + (1 + E + o_e)[None, :], b_counts, mask=m_head)


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
) -> tuple[list[Tensor], Tensor]:
    """One (T, N) output per projection, and the ungated shrink (T, P) that backward needs."""
    if x_TK.dtype == torch.float64:  # tensor cores stop at fp32; fp64 is for checking gradients
        return portable.forward(
            x_TK, weights_NK, biases_N, lora_a_RK, lora_b_NR, gates_THE, dropout_seed, scaling, dropout_p, stream
        )
    x_TK = rows_contiguous(x_TK)
    a_PK, *lora_b_NR = joined([lora_a_RK, *([b] for b in lora_b_NR)], [x_TK.dtype] * (1 + len(lora_b_NR)))
    s = shrink(x_TK, a_PK, dropout_seed, dropout_p, stream)
    return expand(x_TK, weights_NK, biases_N, lora_b_NR, s, gates_THE, scaling), s


def shrink(x_TK: Tensor, a_PK: Tensor, dropout_seed: Tensor | None, dropout_p: float, stream: int) -> Tensor:
    """dropout(x) @ a^T, (T, P) in x's dtype."""
    return _shrink(x_TK, a_PK, dropout_seed, dropout_p, stream)[0]


class Routers(NamedTuple):
    """H routers that read the same input; shapes as in :func:`molora_kernels.router`."""

    weight: Tensor
    """(H, E, K) fp32, or where it rides along the bf16 planes of it, (3, H * E, K)"""
    bias: Tensor | None
    """(H * E,) fp32"""
    selection_bias: Tensor | None
    """(H * E,) fp32"""
    mask: Tensor | None
    top_k: int


class Routed(NamedTuple):
    gates: Tensor
    """(T, H, E) fp32"""
    logits: Tensor
    """(T, H, E) fp32"""
    partials: Tensor
    """(blocks, H, 1 + 2E) fp32: what each block of rows contributes to the sums and counts"""


def route_and_shrink(
    x_TK: Tensor,
    a_PK: Tensor,
    routers: Routers,
    heads: int,
    experts: int,
    dropout_seed: Tensor | None,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Routed]:
    """The shrink and what the routers say of x itself, in one pass over x; only where ``tiles.rides_along``."""
    s, routed = _shrink(x_TK, a_PK, dropout_seed, dropout_p, stream, routers, heads, experts)
    assert routed is not None
    return s, routed


def _shrink(
    x_TK: Tensor,
    a_PK: Tensor,
    dropout_seed: Tensor | None,
    dropout_p: float,
    stream: int,
    routers: Routers | None = None,
    H: int = 0,
    E: int = 1,
) -> tuple[Tensor, Routed | None]:
    (T, K), P = x_TK.shape, a_PK.shape[0]
    heads, experts = tiles.padded_experts(H, E)
    Q = heads * experts if routers else 0
    tile = tiles.shrink_tiles(P, tiles.PLANES * Q, x_TK.dtype, capability_of(x_TK.device), drops=dropout_p > 0)
    blocks_p, blocks_t = cdiv(P, tile.block_n), cdiv(T, tile.block_t)
    s = x_TK.new_empty(T, P)
    gates = logits = partials = None
    given: tuple[Tensor | None, ...] = (None,) * 4
    if routers is not None:
        assert tiles.rides_along(P, Q, x_TK.dtype)
        gates, logits = (x_TK.new_empty(T, H, E, dtype=torch.float32) for _ in range(2))
        partials = x_TK.new_empty(blocks_t, H, 1 + 2 * E, dtype=torch.float32)
        given = routers[:4]
    if T and P:
        with launching_on(x_TK.device):
            shrink_fwd_kernel[(blocks_p * blocks_t,)](
                x_TK, a_PK, dropout_seed if dropout_p else None, s, *given, gates, logits, partials,
                T, K, P, H, x_TK.stride(0), stream, dropout.threshold(dropout_p), dropout.survivor_scale(dropout_p),
                TOP_K=routers.top_k if routers else 1, E=E, E_PAD=experts, HEADS=heads,
                BLOCK_T=tile.block_t, BLOCK_P=tile.block_n, BLOCK_K=tile.block_k,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    return s, Routed(gates, logits, partials) if gates is not None else None


def expand(
    x_TK: Tensor,
    weights_NK: list[Tensor],
    biases_N: list[Tensor],
    lora_b_NR: list[Tensor],
    s_TP: Tensor,
    gates_THE: Tensor | None,
    scaling: float,
) -> list[Tensor]:
    """y_g = x W_g^T + b_g + scaling * (gates * s)_g B_g^T, all in x's dtype.

    The adapter's product comes first and the base projection adds to it: a matmul that reads its output tile once, in
    its epilogue, hides that read, and the small addend is the one that is rounded.
    """
    if gates_THE is not None:  # which have the scaling in them
        s_TP, scaling = gating.gate(s_TP, gates_THE, len(lora_b_NR), scaling), 1.0
    outputs = []
    for g, (b, part) in enumerate(zip(lora_b_NR, s_TP.chunk(len(lora_b_NR), 1), strict=True)):
        if biases_N:
            y = torch.addmm(biases_N[g], part, b.T, alpha=scaling)
        else:
            y = part.new_empty(len(part), len(b)).addmm_(part, b.T, beta=0, alpha=scaling)
        outputs.append(y.addmm_(x_TK, weights_NK[g].T) if weights_NK else y)
    return outputs


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself if each of its rows is contiguous, which is all that the kernels ask, else a copy.

    A copy also of rows so far apart that an int32 does not reach the last of them: cuBLAS (13.0, fp16, three rows on an
    H200) fails there, though not where as many elements lie together.
    """
    apart = x.stride(0) > x.shape[1] and x.shape[0] * x.stride(0) > 2**31 - 1
    return x if x.stride(-1) == 1 and not apart else x.contiguous()


def compile_cases(capability: Capability) -> Iterator[Case]:
    for (P, H, E), dtype in itertools.product(tiles.COMPILED, DTYPES):
        heads, experts = tiles.padded_experts(H, E)
        Q = heads * experts if H else 0
        if not tiles.rides_along(P, Q, dtype):
            H = E = Q = 0
        routing = ("p_router", "p_bias", "p_selection", "p_gates", "p_logits", "p_partials")
        pointers = {"p_x": dtype, "p_a": dtype, "p_s": dtype}
        absent = {} if H else dict.fromkeys((*routing, "p_mask"))
        if H:
            pointers |= {**dict.fromkeys(routing, torch.float32), "p_router": dtype, "p_mask": torch.bool}
        for has_dropout in (True, False):
            tile = tiles.shrink_tiles(P, tiles.PLANES * Q, dtype, capability, drops=has_dropout)
            yield Case(
                kernel=shrink_fwd_kernel,
                label=f"{short(dtype)} P={P} H={H} E={E}{' dropout' if has_dropout else ''}",
                pointers=pointers | ({"p_seed": torch.int64} if has_dropout else {}),
                scalars=dict(T=8192, K=3072, P=P, H=H, stride_xt=3072, stream=0, threshold=5243, keep_scale=1.087),
                constants=absent | ({} if has_dropout else {"p_seed": None})
                | dict(TOP_K=min(2, E) or 1, E=E or 1, E_PAD=experts, HEADS=heads)
                | dict(BLOCK_T=tile.block_t, BLOCK_P=tile.block_n, BLOCK_K=tile.block_k),
                tiles=tile,
                tensor_cores=dtype != torch.float32,
            )  # fmt: skip
