"""Gates on the shrink, which is small: forward, and backward with the routers' own (K3).

Shape letters: T tokens, G projections that read the same input, E experts, r rank of one expert, R = E * r,
P = G * R columns of the shrink, H gate sets (G, or 1 shared by all projections).
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps nor that constexpr takes an int.)
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.dot import bf16_terms
from molora_kernels._triton.routing import dlogits_of_gates, dlogits_of_sums, softmax
from molora_kernels._triton.tiles import Capability, Tiles, cdiv, launching_on, next_power_of_2
from molora_kernels.grouped_lora import tiles

GATE_ROWS, GATE_COLUMNS, BACKWARD_ROWS = 16, 64, 32
"""One program's share of these kernels, which are bound by memory and by launching; the first two measured on sm_90."""
FORWARD_TILES = Tiles(block_t=GATE_ROWS, block_k=0, block_n=GATE_COLUMNS)
BACKWARD_TILES = Tiles(block_t=BACKWARD_ROWS, block_k=0)


@triton.jit
def gate_fwd_kernel(
    p_s,
    p_gates,
    p_gated,
    T,
    P,
    R,
    H,
    E,
    scaling,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """gated (T, P) = scaling * gate * s, multiplied in fp32 and rounded once."""
    i_t, i_p = tl.program_id(0), tl.program_id(1)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m = (o_t < T)[:, None] & (o_p < P)[None, :]
    o_s = o_t.to(tl.int64)[:, None] * P + o_p[None, :]
    o_h = tl.minimum(o_p // R, H - 1)
    o_e = (o_p % R) // (R // E)
    o_g = o_t.to(tl.int64)[:, None] * (H * E) + (o_h * E + o_e)[None, :]
    b_c = scaling * tl.load(p_gates + o_g, mask=m, other=0.0)
    b_s = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32)
    tl.store(p_gated + o_s, (b_c * b_s).to(p_gated.dtype.element_ty), mask=m)


@triton.jit
def gate_bwd_kernel(
    p_dgated,
    p_s,
    p_gates,
    p_ds,
    p_gated,
    p_logits,
    p_more,
    p_dsums,
    p_mask,
    p_out,
    T,
    P,
    R,
    r,
    H,
    groups_per_head,
    scaling,
    TOP_K: tl.constexpr,
    AS_PLANES: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """With c = scaling * gate: ds = c * dgated, gated = c * s, dgate_e = scaling * <dgated_e, s_e>.

    One program: BLOCK_T tokens and one gate set. Out (T, H, E) goes dgates, or with a router the logits' gradient: from
    dgates, from ``more`` of them that another projection contributes, and from the routers' sums; rounded once, or
    AS_PLANES, three bf16 ones (3, T, H, E).
    """
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = tl.arange(0, BLOCK_R)
    o_e = tl.arange(0, E_PAD)
    m_t = o_t < T
    o_row = o_t.to(tl.int64)

    b_dgates = tl.zeros([BLOCK_T, E_PAD], dtype=tl.float32)
    for i in range(groups_per_head * E):
        i_g, i_e = i_h * groups_per_head + i // E, i % E
        b_c = scaling * tl.load(p_gates + o_row * (H * E) + (i_h * E + i_e), mask=m_t, other=0.0)
        b_dgate = tl.zeros([BLOCK_T], dtype=tl.float32)
        for i_r in range(tl.cdiv(r, BLOCK_R)):
            m = m_t[:, None] & (i_r * BLOCK_R + o_r < r)[None, :]
            o_s = o_row[:, None] * P + (i_g * R + i_e * r + i_r * BLOCK_R + o_r)[None, :]
            b_dgated = tl.load(p_dgated + o_s, mask=m, other=0.0).to(tl.float32)
            if p_ds is not None:
                tl.store(p_ds + o_s, (b_c[:, None] * b_dgated).to(p_ds.dtype.element_ty), mask=m)
            if p_gated is not None or p_out is not None:
                b_s = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32)
                if p_gated is not None:
                    tl.store(p_gated + o_s, (b_c[:, None] * b_s).to(p_gated.dtype.element_ty), mask=m)
                if p_out is not None:
                    b_dgate += tl.sum(b_dgated * b_s, axis=1)
        if p_out is not None:
            b_dgates += tl.where((o_e == i_e)[None, :], b_dgate[:, None], 0.0)
    if p_out is not None:
        o_out = o_row[:, None] * (H * E) + (i_h * E + o_e)[None, :]
        m_out = m_t[:, None] & (o_e < E)[None, :]
        b_out = b_dgates * scaling
        if p_logits is not None:
            if p_more is not None:
                b_out += tl.load(p_more + o_out, mask=m_out, other=0.0)
            b_gates = tl.load(p_gates + o_out, mask=m_out, other=0.0)
            b_probs, b_lse = softmax(tl.load(p_logits + o_out, mask=m_out, other=0.0), E, E_PAD)
            b_out = dlogits_of_gates(b_gates, b_out, b_probs, TOP_K)
            if p_dsums is not None:
                p_head = p_dsums + i_h * (1 + E)
                b_dprobs = tl.load(p_head + 1 + o_e, mask=o_e < E, other=0.0)[None, :]
                if p_mask is not None:
                    m_t = m_t & (tl.load(p_mask + o_t, mask=m_t, other=0) != 0)
                b_out += dlogits_of_sums(b_probs, b_lse, tl.load(p_head), b_dprobs, m_t)
        if AS_PLANES:
            plane = tl.cast(T, tl.int64) * (H * E)  # T.to fails where T is 1, which is a constant then
            b_high, b_middle, b_low = bf16_terms(b_out)
            tl.store(p_out + o_out, b_high, mask=m_out)
            tl.store(p_out + plane + o_out, b_middle, mask=m_out)
            tl.store(p_out + 2 * plane + o_out, b_low, mask=m_out)
        else:
            tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


def gate(s_TP: Tensor, gates_THE: Tensor, groups: int, scaling: float) -> Tensor:
    """scaling * gate * s, (T, P) in s's dtype."""
    (T, P), (_, H, E) = s_TP.shape, gates_THE.shape
    gated = torch.empty_like(s_TP)
    if s_TP.numel():
        with launching_on(s_TP.device):
            gate_fwd_kernel[(cdiv(T, GATE_ROWS), cdiv(P, GATE_COLUMNS))](
                s_TP, gates_THE.contiguous(), gated, T, P, P // groups, H, E, scaling,
                BLOCK_T=GATE_ROWS, BLOCK_P=GATE_COLUMNS, num_warps=FORWARD_TILES.num_warps,
            )  # fmt: skip
    return gated


class RouterGrads(NamedTuple):
    """What the gradient of H routers' logits is made of, besides the gates' own."""

    logits: Tensor
    """(T, H, E) fp32"""
    more_dgates: Tensor | None
    """(T, H, E) fp32: what another projection's gates contribute"""
    dsums: Tensor | None
    """(H, 1 + E) fp32"""
    mask: Tensor | None
    top_k: int
    as_planes: bool = False
    """Whether it is wanted as bf16 planes, as ``tiles.as_planes`` says."""


def gate_backward(
    dgated_TP: Tensor,
    s_TP: Tensor,
    gates_THE: Tensor,
    groups: int,
    scaling: float,
    *,
    need_ds: bool,
    need_gated: bool,
    need_dgates: bool,
    router: RouterGrads | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ds and gated (T, P) in s's dtype; dgates, or dlogits where a router is given, (T, H, E) in the gates' dtype, or
    its planes (3, T, H, E).

    Whatever is not needed is empty.
    """
    (T, P), (_, H, E) = s_TP.shape, gates_THE.shape
    R, gates = P // groups, gates_THE.contiguous()
    logits, more, dsums, mask, top_k, planes = router or (None, None, None, None, 1, False)
    ds = torch.empty_like(s_TP) if need_ds else None
    gated = torch.empty_like(s_TP) if need_gated else None
    out = None
    if need_dgates:
        out = gates.new_empty(3, T, H, E, dtype=torch.bfloat16) if planes else torch.empty_like(gates)
    if s_TP.numel() and (need_ds or need_gated or need_dgates):
        with launching_on(s_TP.device):
            gate_bwd_kernel[(cdiv(T, BACKWARD_ROWS), H)](
                dgated_TP, s_TP, gates, ds, gated, logits, more, dsums, mask, out,
                T, P, R, R // E, H, groups // H, scaling,
                TOP_K=top_k, AS_PLANES=planes, E=E, E_PAD=next_power_of_2(E),
                BLOCK_T=BACKWARD_ROWS, BLOCK_R=_block_r(R // E),
                num_warps=BACKWARD_TILES.num_warps,
            )  # fmt: skip
    nothing = s_TP.new_empty(0)
    return nothing if ds is None else ds, nothing if gated is None else gated, nothing if out is None else out


def _block_r(r: int) -> int:
    return min(next_power_of_2(r), 64)


def compile_cases(_: Capability) -> Iterator[Case]:
    for (groups, H, E, r), dtype in itertools.product(COMPILED, DTYPES):
        shape = dict(T=8192, P=groups * E * r, R=E * r, H=H)
        yield Case(
            kernel=gate_fwd_kernel,
            label=f"{short(dtype)} G={groups} H={H} E={E} r={r}",
            pointers={"p_s": dtype, "p_gated": dtype, "p_gates": torch.float32},
            scalars={**shape, "E": E, "scaling": 2.0},
            constants={"BLOCK_T": GATE_ROWS, "BLOCK_P": GATE_COLUMNS},
            tiles=FORWARD_TILES,
            tensor_cores=False,
        )
        outs = {" planes": torch.bfloat16} if tiles.as_planes(H * E, dtype) else {}
        for what, out in (outs | {"": torch.float32, " without dgates": None}).items():
            routing = dict.fromkeys(("p_logits", "p_more", "p_dsums"), torch.float32) | {"p_mask": torch.bool}
            yield Case(
                kernel=gate_bwd_kernel,
                label=f"{short(dtype)} G={groups} H={H} E={E} r={r}{what}",
                pointers=dict.fromkeys(("p_dgated", "p_s", "p_ds", "p_gated"), dtype)
                | {"p_gates": torch.float32} | (routing | {"p_out": out} if out else {}),
                scalars={**shape, "r": r, "groups_per_head": groups // H, "scaling": 2.0},
                constants=dict(TOP_K=min(2, E), AS_PLANES=out == torch.bfloat16, E=E, E_PAD=next_power_of_2(E))
                | dict(BLOCK_T=BACKWARD_ROWS, BLOCK_R=_block_r(r))
                | ({} if out else dict.fromkeys((*routing, "p_out"))),
                tiles=BACKWARD_TILES,
                tensor_cores=False,
            )  # fmt: skip


COMPILED = ((1, 1, 4, 32), (2, 2, 4, 32), (2, 1, 4, 32), (2, 2, 64, 8), (1, 1, 5, 100))
"""(G, H, E, r) of the compile matrix: mixtures with own and shared gates, many experts, odd shapes."""
