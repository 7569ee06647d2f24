"""The router's forward as Triton kernels: one pass over x gives logits, gates and the sums of both losses.

Shape letters: T tokens, K input features, H routers that read the same input, E experts, E_PAD experts padded to a
power of two, HEADS routers of one program, B blocks of tokens.
"""

# Kernels are Python in spelling only, so these do not apply to them.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.dot import dot_by_fp32
from molora_kernels._triton.pick import pick, pick_block
from molora_kernels._triton.routing import choose, gates_of, softmax, sums_of
from molora_kernels._triton.tiles import Capability, Tiles, capability_of, cdiv, launching_on, next_power_of_2

MAX_EXPERTS, MAX_TOP_K = 64, 8
MAX_COLUMNS = 256
"""Most logits of one token, H * E: backward holds a program's share of them all in registers."""


@triton.jit
def router_fwd_kernel(
    p_x,
    p_weight,
    p_bias,
    p_selection_bias,
    p_mask,
    p_gates,
    p_logits,
    p_partials,
    T,
    K,
    H,
    stride_xt,
    stride_xk,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    p_rows = p_x + o_t.to(tl.int64)[:, None] * stride_xt

    # Columns of the accumulator: the routers' experts side by side, each router padded to E_PAD.
    o_column = tl.arange(0, HEADS * E_PAD)
    o_head, o_expert = i_h * HEADS + o_column // E_PAD, o_column % E_PAD
    m_column = (o_head < H) & (o_expert < E)
    o_he = o_head * E + o_expert

    b_acc = tl.zeros((BLOCK_T, HEADS * E_PAD), dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BLOCK_K)):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_x = tl.load(p_rows + o_k.to(tl.int64)[None, :] * stride_xk, mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_weight = tl.load(
            p_weight + o_he.to(tl.int64)[:, None] * K + o_k[None, :], mask=m_column[:, None] & m_k[None, :], other=0.0
        )
        b_acc = dot_by_fp32(b_x, tl.trans(b_weight), b_acc)
    if p_bias is not None:
        b_acc += tl.load(p_bias + o_he, mask=m_column, other=0.0)[None, :]

    # From here on a row is a (token, router) pair and a column an expert.
    b_logits = tl.reshape(b_acc, (BLOCK_T * HEADS, E_PAD))
    o_row, o_e = tl.arange(0, BLOCK_T * HEADS), tl.arange(0, E_PAD)
    o_token, o_h = i_t * BLOCK_T + o_row // HEADS, i_h * HEADS + o_row % HEADS
    m_row, m_e = (o_token < T) & (o_h < H), o_e < E

    b_probs, b_lse = softmax(b_logits, E, E_PAD)
    b_scores = b_logits
    if p_selection_bias is not None:
        p_scores = p_selection_bias + o_h[:, None] * E + o_e[None, :]
        b_scores = b_probs + tl.load(p_scores, mask=(o_h < H)[:, None] & m_e[None, :], other=0.0)
    b_chosen = choose(b_scores, TOP_K, E, E_PAD)
    b_gates = gates_of(b_logits, b_probs, b_chosen, TOP_K)

    o_out = (o_token.to(tl.int64) * H + o_h)[:, None] * E + o_e[None, :]
    m_out = m_row[:, None] & m_e[None, :]
    tl.store(p_gates + o_out, b_gates, mask=m_out)
    tl.store(p_logits + o_out, b_logits, mask=m_out)

    m_valid = m_row
    if p_mask is not None:
        m_valid = m_valid & (tl.load(p_mask + o_token, mask=o_token < T, other=0) != 0)
    b_z, b_prob_sums, b_counts = sums_of(b_probs, b_lse, b_chosen, m_valid, HEADS, E_PAD)
    o_heads = i_h * HEADS + tl.arange(0, HEADS)
    p_block = p_partials + (i_t * H + o_heads) * (1 + 2 * E)
    m_sums = (o_heads < H)[:, None] & m_e[None, :]
    tl.store(p_block, b_z, mask=o_heads < H)
    tl.store(p_block[:, None] + 1 + o_e[None, :], b_prob_sums, mask=m_sums)
    tl.store(p_block[:, None] + 1 + E + o_e[None, :], b_counts, mask=m_sums)


@triton.jit
def router_sums_kernel(
    p_partials, p_sums, p_counts, Bs, Hs, E: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Sum of the blocks' partials, one router a program, always in the same order; of routers that read one input and,
    after them, of those that read another."""
    i_h = tl.program_id(0)
    i, i_own = pick_block(Hs, i_h, 1)
    p_own, B, H = pick(p_partials, i), pick(Bs, i), pick(Hs, i)
    o_c = tl.arange(0, COLUMNS)
    b_acc = tl.zeros((BLOCK_B, COLUMNS), dtype=tl.float32)
    for i_b in range(0, tl.cdiv(B, BLOCK_B)):
        o_b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
        p_block = p_own + ((o_b * H + i_own) * (1 + 2 * E))[:, None] + o_c[None, :]
        b_acc += tl.load(p_block, mask=(o_b < B)[:, None] & (o_c < 1 + 2 * E)[None, :], other=0.0)
    b_sums = tl.sum(b_acc, axis=0)
    tl.store(p_sums + i_h * (1 + E) + o_c, b_sums, mask=o_c < 1 + E)
    tl.store(p_counts + i_h * E + o_c - (1 + E), b_sums, mask=(o_c >= 1 + E) & (o_c < 1 + 2 * E))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selection_bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates (T, H, E), logits (T, H, E), sums (H, 1 + E), counts (H, E), all fp32; as ``portable.forward``.

    Raises as :func:`route`.
    """
    gates, logits, partials = route(x, weight, bias, selection_bias, mask, top_k)
    return gates, logits, *add_up([partials])


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selection_bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates and logits (T, H, E), and what each block of rows contributes to sums and counts, for :func:`add_up`.

    Raises:
        ValueError: more experts or a larger top_k than the kernels are made for, or a dtype they do not take.
    """
    (tokens, features), (heads, experts, _) = x.shape, weight.shape
    check_supported(x, heads, experts, top_k)
    tiles = forward_tiles(heads, experts, x.dtype, capability_of(x.device))
    e_pad, head_tile = column_tile(heads, experts)
    blocks = cdiv(tokens, tiles.block_t)

    gates = torch.empty(tokens, heads, experts, dtype=torch.float32, device=x.device)
    logits = torch.empty_like(gates)
    partials = torch.empty(blocks, heads, 1 + 2 * experts, dtype=torch.float32, device=x.device)
    with launching_on(x.device):
        if tokens:
            router_fwd_kernel[(blocks, cdiv(heads, head_tile))](
                x, fp32(weight), fp32(bias), fp32(selection_bias), flags(mask), gates, logits, partials,
                tokens, features, heads, x.stride(0), x.stride(1),
                TOP_K=top_k, E=experts, E_PAD=e_pad, HEADS=head_tile,
                BLOCK_T=tiles.block_t, BLOCK_K=tiles.block_k,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
    return gates, logits, partials


def add_up(partials: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums (H, 1 + E) and counts (H, E) of what each block of rows contributes, (blocks_i, H_i, 1 + 2E) fp32 of those
    routers that read one input; H is the sum of H_i."""
    blocks, heads, columns = zip(*[t.shape for t in partials], strict=True)
    experts, first = columns[0] // 2, partials[0]
    sums, counts = first.new_empty(sum(heads), 1 + experts), first.new_empty(sum(heads), experts)
    with launching_on(first.device):
        router_sums_kernel[(len(sums),)](
            tuple(partials), sums, counts, blocks, heads, E=experts, **sums_blocks(experts), num_warps=SUMS_WARPS
        )  # fmt: skip
    return sums, counts


SUMS_WARPS = 4


def sums_blocks(experts: int) -> dict[str, int]:
    """For :func:`router_sums_kernel`: 32 numbers a thread at a time. One program adds all the rows of a router, so it
    waits for memory once for each step; a step is as long as registers allow."""
    columns = next_power_of_2(1 + 2 * experts)
    return {"COLUMNS": columns, "BLOCK_B": 32 * 32 * SUMS_WARPS // columns}


def forward_tiles(heads: int, experts: int, dtype: torch.dtype, capability: Capability) -> Tiles:
    """For :func:`router_fwd_kernel`. Bound by reading x: many small blocks of rows, several loads of x in flight."""
    columns = _columns(heads, experts)
    stages = 2 if capability is None else 3
    if dtype == torch.float32:
        # products on the fp32 units, operands in registers
        return Tiles(block_t=16, block_k=32 if columns <= 32 else 16, num_warps=4, num_stages=2)
    if columns <= 16:
        return Tiles(block_t=32, block_k=64, num_warps=4, num_stages=stages + 1)
    # Every program reads all of W from L2: the wider W, the more rows share a reading. On sm_100 64 rows spill.
    rows = 32 if capability is not None and capability[0] == 10 and columns > 32 else 64
    return Tiles(block_t=rows, block_k=64 if columns <= 32 else 32, num_warps=8, num_stages=stages)


def column_tile(heads: int, experts: int) -> tuple[int, int]:
    """(E_PAD, HEADS): powers of two with 16 (what a matrix instruction takes) to 128 columns together."""
    e_pad = next_power_of_2(experts)
    head_tile = min(next_power_of_2(heads), max(128 // e_pad, 1))
    return max(e_pad, 16 // head_tile), head_tile


def _columns(heads: int, experts: int) -> int:
    e_pad, head_tile = column_tile(heads, experts)
    return e_pad * head_tile


def check_supported(x: Tensor, heads: int, experts: int, top_k: int) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"router: the Triton kernels take fp16, bf16 or fp32, not {x.dtype}; use backend 'torch'")
    if experts > MAX_EXPERTS or top_k > MAX_TOP_K or heads * experts > MAX_COLUMNS:
        raise ValueError(
            f"router: the Triton kernels take up to {MAX_EXPERTS} experts, top_k up to {MAX_TOP_K} and {MAX_COLUMNS} "
            f"logits a token, not {experts}, {top_k} and {heads} x {experts}; use backend 'torch'"
        )


def fp32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32).contiguous()


def flags(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.bool).contiguous()


ROUTERS = ((1, 4), (2, 4), (3, 4), (7, 5), (3, 8), (2, 32), (1, 64), (2, 64), (4, 64))
"""(H, E) of the compile matrix: the recipe's, and every padded width that tiles depend on."""


def compile_cases(capability: Capability) -> Iterator[Case]:
    for heads, experts in ROUTERS:
        e_pad, head_tile = column_tile(heads, experts)
        for dtype in DTYPES:
            tiles = forward_tiles(heads, experts, dtype, capability)
            for top_k in (1, 2) if (heads, experts) == (1, 4) else (2,) if experts < 64 else (8,):
                yield Case(
                    kernel=router_fwd_kernel,
                    label=f"{short(dtype)} H={heads} E={experts} k={top_k}",
                    pointers={
                        "p_x": dtype,
                        **dict.fromkeys(("p_weight", "p_bias", "p_selection_bias"), torch.float32),
                        "p_mask": torch.bool,
                        **dict.fromkeys(("p_gates", "p_logits", "p_partials"), torch.float32),
                    },
                    scalars={"T": 8192, "K": 3072, "H": heads, "stride_xt": 3072, "stride_xk": 1},
                    constants={
                        "TOP_K": top_k,
                        "E": experts,
                        "E_PAD": e_pad,
                        "HEADS": head_tile,
                        "BLOCK_T": tiles.block_t,
                        "BLOCK_K": tiles.block_k,
                    },
                    tiles=tiles,
                    tensor_cores=dtype != torch.float32,
                )
        for what, blocks in (("", (256,)), (" and another", (256, 128)), (" and another T=1", (1, 1))):
            yield Case(
                kernel=router_sums_kernel,
                label=f"H={heads} E={experts}{what}",
                pointers=dict.fromkeys(("p_sums", "p_counts"), torch.float32)
                | {"p_partials": (torch.float32,) * len(blocks)},
                scalars={"Bs": blocks, "Hs": (heads, 1)[: len(blocks)]},
                constants={"E": experts, **sums_blocks(experts)},
                tiles=Tiles(block_t=0, block_k=0, num_warps=SUMS_WARPS),
                tensor_cores=False,
            )
