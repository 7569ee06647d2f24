"""The router's backward as Triton kernels: dlogits on a tile in registers, then one pass over x for dW and dx.

Shape letters: T tokens, K input features, H routers that read the same input, E experts, E_PAD experts padded to a
power of two, C = H * E logits of a token, C_PAD padded to a power of two, S splits of the tokens.
"""

# Kernels are Python in spelling only, so these do not apply to them.
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.dot import dot_by_fp32, dot_fp32_by_fp32
from molora_kernels._triton.routing import dlogits_of_gates, dlogits_of_sums, softmax
from molora_kernels._triton.tiles import Capability, Tiles, capability_of, cdiv, launching_on, next_power_of_2
from molora_kernels.router.forward import ROUTERS, check_supported, flags, fp32


@triton.jit
def router_bwd_dlogits_kernel(
    p_dgates,
    p_dsums,
    p_logits,
    p_gates,
    p_mask,
    p_dlogits,
    ROWS,
    H,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """A row is a (token, router) pair."""
    o_row, o_e = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, E_PAD)
    m_row, m_e = o_row < ROWS, o_e < E
    o_io, m_io = o_row.to(tl.int64)[:, None] * E + o_e[None, :], m_row[:, None] & m_e[None, :]

    b_probs, b_lse = softmax(tl.load(p_logits + o_io, mask=m_io, other=0.0), E, E_PAD)
    b_dlogits = tl.zeros((BLOCK_ROWS, E_PAD), dtype=tl.float32)
    if p_dgates is not None:
        b_gates = tl.load(p_gates + o_io, mask=m_io, other=0.0)
        b_dgates = tl.load(p_dgates + o_io, mask=m_io, other=0.0)
        b_dlogits = dlogits_of_gates(b_gates, b_dgates, b_probs, TOP_K)
    if p_dsums is not None:
        m_valid = m_row
        if p_mask is not None:
            m_valid = m_valid & (tl.load(p_mask + o_row // H, mask=m_row, other=0) != 0)
        p_head = p_dsums + (o_row % H) * (1 + E)
        b_dz = tl.load(p_head, mask=m_row, other=0.0)
        b_dprobs = tl.load(p_head[:, None] + 1 + o_e[None, :], mask=m_io, other=0.0)
        b_dlogits += dlogits_of_sums(b_probs, b_lse, b_dz, b_dprobs, m_valid)
    tl.store(p_dlogits + o_io, b_dlogits, mask=m_io)


@triton.jit
def router_bwd_kernel(
    p_dlogits,
    p_x,
    p_weight,
    p_dx,
    p_dweight,
    p_dbias,
    T,
    K,
    T_SPLIT,
    stride_xt,
    stride_xk,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dx = dlogits W`` and this split's part of ``dW = dlogits^T x``, for one tile of features and one split of the
    tokens: x is read once, and W's tile stays in registers. Programs of the first tile also add up dbias."""
    i_k, i_s = tl.program_id(0), tl.program_id(1)
    o_k, o_c = i_k * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, C_PAD)
    m_k, m_c = o_k < K, o_c < C

    if p_dx is not None:
        b_weight = tl.load(
            p_weight + o_c.to(tl.int64)[:, None] * K + o_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0.0
        )
    b_dweight = tl.zeros((BLOCK_K, C_PAD), dtype=tl.float32)
    b_dbias = tl.zeros((C_PAD,), dtype=tl.float32)
    t_start = i_s * T_SPLIT
    t_end = min(t_start + T_SPLIT, T)
    for t in range(t_start, t_end, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_t = o_t < t_end
        b_dlogits = tl.load(
            p_dlogits + o_t.to(tl.int64)[:, None] * C + o_c[None, :], mask=m_t[:, None] & m_c[None, :], other=0.0
        )
        if p_dx is not None:
            b_dx = dot_fp32_by_fp32(
                b_dlogits, b_weight, tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32), p_dx.dtype.element_ty
            )
            p_out = p_dx + o_t.to(tl.int64)[:, None] * K + o_k[None, :]
            tl.store(p_out, b_dx.to(p_dx.dtype.element_ty), mask=m_t[:, None] & m_k[None, :])
        if p_dweight is not None:
            o_x = o_t.to(tl.int64)[:, None] * stride_xt + o_k.to(tl.int64)[None, :] * stride_xk
            b_x = tl.load(p_x + o_x, mask=m_t[:, None] & m_k[None, :], other=0.0)
            b_dweight = dot_by_fp32(tl.trans(b_x), b_dlogits, b_dweight)
            b_dbias += tl.sum(b_dlogits, axis=0)

    if p_dweight is not None:
        p_part = p_dweight + (i_s * C + o_c).to(tl.int64)[None, :] * K + o_k[:, None]
        tl.store(p_part, b_dweight, mask=m_k[:, None] & m_c[None, :])
        if i_k == 0:
            tl.store(p_dbias + i_s * C + o_c, b_dbias, mask=m_c)


def backward(
    dgates: Tensor | None,
    dsums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    top_k: int,
    need_dx: bool = True,
    need_drouter: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, K) in x's dtype, dweight (H, E, K) and dbias (H, E) fp32; what is not needed is empty."""
    heads, experts, features = weight.shape
    check_supported(x, heads, experts, top_k)
    dlogits = dlogits_of(dgates, dsums, logits, gates, mask, top_k)
    columns = heads * experts
    dx, dweight, dbias = through_logits(
        dlogits.view(-1, columns), x, weight.reshape(columns, features), need_dx, need_drouter
    )
    if need_drouter:
        dweight, dbias = dweight.view(weight.shape), dbias.view(heads, experts)
    return dx, dweight, dbias


def dlogits_of(
    dgates: Tensor | None,
    dsums: Tensor | None,
    logits: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    top_k: int,
) -> Tensor:
    """(T, H, E) fp32: the gradient of the logits from the gates and from the sums that the router losses read."""
    tokens, heads, experts = logits.shape
    e_pad = next_power_of_2(experts)
    rows = tokens * heads
    tiles = dlogits_tiles(experts)
    dlogits = torch.empty_like(logits)
    if rows:
        with launching_on(logits.device):
            router_bwd_dlogits_kernel[(cdiv(rows, tiles.block_t),)](
                fp32(dgates), fp32(dsums), logits, gates, flags(mask), dlogits, rows, heads,
                TOP_K=top_k, E=experts, E_PAD=e_pad, BLOCK_ROWS=tiles.block_t, num_warps=tiles.num_warps,
            )  # fmt: skip
    return dlogits


def through_logits(
    dlogits: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_drouter: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, K), dweight (C, K) and dbias (C,) from dlogits (T, C) and weight (C, K); what is not needed is empty."""
    (tokens, features), columns = x.shape, weight.shape[0]
    tiles = backward_tiles(columns, x.dtype, capability_of(x.device))
    k_tiles = cdiv(features, tiles.block_k)
    t_split = tokens_per_split(tokens, k_tiles, tiles.block_t)
    splits = cdiv(tokens, t_split)

    dx = torch.empty((tokens, features) if need_dx else 0, dtype=x.dtype, device=x.device)
    parts = splits if need_drouter else 0
    dweight = torch.empty(parts, columns, features, dtype=torch.float32, device=x.device)
    dbias = torch.empty(parts, columns, dtype=torch.float32, device=x.device)
    if splits and k_tiles:
        with launching_on(x.device):
            router_bwd_kernel[(k_tiles, splits)](
                dlogits, x, fp32(weight), dx if need_dx else None,
                dweight if need_drouter else None, dbias if need_drouter else None,
                tokens, features, t_split, x.stride(0), x.stride(1),
                C=columns, C_PAD=max(next_power_of_2(columns), 16), BLOCK_T=tiles.block_t, BLOCK_K=tiles.block_k,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
    if not need_drouter:
        return dx, dlogits.new_empty(0), dlogits.new_empty(0)
    return dx, dweight.sum(0), dbias.sum(0)


PROGRAMS, MOST_SPLITS = 512, 64
"""A few programs per multiprocessor of every GPU; a number that changed with the GPU would change the rounding."""


def tokens_per_split(tokens: int, k_tiles: int, block_t: int) -> int:
    """A multiple of block_t that makes about PROGRAMS programs of at most MOST_SPLITS splits."""
    splits = min(max(PROGRAMS // max(k_tiles, 1), 1), MOST_SPLITS)
    return max(cdiv(cdiv(tokens, splits), block_t), 1) * block_t


def backward_tiles(columns: int, dtype: torch.dtype, capability: Capability) -> Tiles:
    """For :func:`router_bwd_kernel` and this many logits per token. Bound by reading x and writing dx."""
    c_pad = max(next_power_of_2(columns), 16)
    if dtype == torch.float32:
        # The most columns spill on sm_100 with four warps.
        return Tiles(block_t=16, block_k=32 if c_pad <= 32 else 16, num_warps=8 if c_pad > 128 else 4, num_stages=2)
    if c_pad > 128:
        return Tiles(block_t=16, block_k=32, num_warps=8, num_stages=2)
    # On sm_86 and 89, 16 columns spill in bf16 with two stages, 32 with four warps (in fp16 with three stages too).
    if c_pad == 16:
        return Tiles(block_t=32, block_k=128, num_warps=4, num_stages=3)
    if c_pad == 32:
        return Tiles(block_t=32, block_k=64, num_warps=8, num_stages=2)
    return Tiles(block_t=32, block_k=32, num_warps=4, num_stages=2)


def dlogits_tiles(experts: int) -> Tiles:
    """For :func:`router_bwd_dlogits_kernel`: about a thousand elements a program."""
    return Tiles(block_t=max(1024 // next_power_of_2(experts), 16), block_k=0, num_warps=4)


def compile_cases(capability: Capability) -> Iterator[Case]:
    fp32_pointers = dict.fromkeys(("p_dgates", "p_dsums", "p_logits", "p_gates", "p_dlogits"), torch.float32)
    for heads, experts in ROUTERS:
        rows = dlogits_tiles(experts)
        for top_k in (1, 2) if heads == 1 else (2,):
            yield Case(
                kernel=router_bwd_dlogits_kernel,
                label=f"H={heads} E={experts} k={top_k}",
                pointers={**fp32_pointers, "p_mask": torch.bool},
                scalars={"ROWS": 8192 * heads, "H": heads},
                constants={
                    "TOP_K": top_k,
                    "E": experts,
                    "E_PAD": next_power_of_2(experts),
                    "BLOCK_ROWS": rows.block_t,
                },
                tiles=rows,
                tensor_cores=False,
            )
        columns = heads * experts
        for dtype in DTYPES:
            tiles = backward_tiles(columns, dtype, capability)
            pointers = {
                "p_x": dtype,
                "p_dx": dtype,
                **dict.fromkeys(("p_dlogits", "p_weight", "p_dweight", "p_dbias"), torch.float32),
            }
            wanted = {"": (), "dx alone": ("p_dweight", "p_dbias"), "without dx": ("p_dx",)}
            for what, absent in wanted.items() if (heads, experts) == (2, 4) else [("", ())]:
                yield Case(
                    kernel=router_bwd_kernel,
                    label=f"{short(dtype)} C={columns} {what}".strip(),
                    pointers={name: type_ for name, type_ in pointers.items() if name not in absent},
                    scalars={"T": 8192, "K": 3072, "T_SPLIT": 512, "stride_xt": 3072, "stride_xk": 1},
                    constants={
                        **dict.fromkeys(absent),
                        "C": columns,
                        "C_PAD": max(next_power_of_2(columns), 16),
                        "BLOCK_T": tiles.block_t,
                        "BLOCK_K": tiles.block_k,
                    },
                    tiles=tiles,
                    tensor_cores=dtype != torch.float32,
                )
