"""Backward of the SwiGLU block on the GPU: down, SwiGLU with its forward recomputed, then gate and up together.

Shape letters: T tokens, K hidden features, I intermediate features, H routers, E experts, P = G * R columns of the
shrink of G projections.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps nor that constexpr takes an int.)
from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.tiles import Capability, launching_on
from molora_kernels.grouped_lora import backward as grouped_lora
from molora_kernels.grouped_lora import gating
from molora_kernels.grouped_lora.forward import rows_contiguous
from molora_kernels.mlp_block import portable
from molora_kernels.mlp_block.forward import BLOCK, TILES
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
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """dx, da, db (3 each), drouter_weights and drouter_biases (one per router); what is not needed is empty."""
    if x_TK.dtype == torch.float64:  # as in forward
        return portable.backward(
            dy_TK, dsums, x_TK, weights, lora_a, lora_b, router_weights, saved, mask_T, dropout_seed,
            top_k, scaling, dropout_p, need_dx, need_dlora, need_drouter,
        )  # fmt: skip
    h_gate, h_up, s_in, s_down, *routed = saved
    gates_in, logits_in, gates_down, logits_down = (t if t.ndim == 3 else None for t in routed)
    routers, own_router = len(router_weights), len(router_weights) == 3
    need_drouter = need_drouter and bool(routers)
    # Experts of gate and up train through down's router too, so frozen routers do not spare their logits' gradient.
    need_dlogits = bool(routers) and (need_dx or need_drouter or need_dlora)
    x_TK, dy_TK, mask = rows_contiguous(x_TK), rows_contiguous(dy_TK), flags(mask_T)
    dsums = fp32(dsums)

    def router_grads(logits: Tensor | None, more: Tensor | None, part: slice) -> gating.RouterGrads | None:
        if logits is None:
            return None
        return gating.RouterGrads(logits, more, None if dsums is None else dsums[part], mask, top_k)

    def stacked_a(part: slice) -> Tensor:
        return torch.cat(lora_a[part]).to(x_TK.dtype)

    def stacked_router(part: slice) -> Tensor | None:
        return torch.cat(router_weights[part]).float() if router_weights[part] and need_dlogits else None

    def given(t: Tensor, needed: bool = True) -> Tensor | None:
        """As (T, columns), or None for the empty tensor that says "not needed"."""
        return t.flatten(1) if needed and t.ndim > 1 else None

    # down, whose input gradient everything below needs
    down, drop = slice(2, 3), (dropout_seed, dropout_p, 1)
    gates = gates_down if own_router else gates_in
    ds, gated, dlogits_down = gating.gate_backward(
        grouped_lora.unexpand([dy_TK], lora_b[down], s_down), s_down, gates, 1, scaling,
        need_ds=True, need_gated=need_dlora, need_dgates=need_dlogits, router=router_grads(logits_down, None, down),
    )  # fmt: skip
    own_dlogits = given(dlogits_down, own_router)
    dh = grouped_lora.input_grad(ds, stacked_a(down), own_dlogits, stacked_router(down), *drop)
    dh.addmm_(dy_TK, weights[2])
    h, dh_gate, dh_up = swiglu_backward(h_gate, h_up, dh, need_h=need_dlora or (need_drouter and own_router))
    db_down = grouped_lora.expand_grads([dy_TK], gated, lora_b[down]) if need_dlora else []
    da_down, drouter_down = grouped_lora.weight_grads(
        h, given(ds, need_dlora), given(dlogits_down, own_router and need_drouter), *drop
    )

    # gate and up
    gate_up, drop = slice(0, 2), (dropout_seed, dropout_p, 0)
    ds, gated, dlogits_in = gating.gate_backward(
        grouped_lora.unexpand([dh_gate, dh_up], lora_b[gate_up], s_in), s_in, gates_in, 2, scaling,
        need_ds=need_dx or need_dlora, need_gated=need_dlora, need_dgates=need_dlogits,
        router=router_grads(logits_in, None if own_router or not need_dlogits else dlogits_down, gate_up),
    )  # fmt: skip
    db_in = grouped_lora.expand_grads([dh_gate, dh_up], gated, lora_b[gate_up]) if need_dlora else []
    da_in, drouter_in = grouped_lora.weight_grads(x_TK, given(ds, need_dlora), given(dlogits_in, need_drouter), *drop)
    dx = x_TK.new_empty(0)
    if need_dx:
        dx = grouped_lora.input_grad(ds, stacked_a(gate_up), given(dlogits_in), stacked_router(gate_up), *drop)
        dx.addmm_(dh_gate, weights[0]).addmm_(dh_up, weights[1])

    da: list[Tensor] = []
    if need_dlora:
        da = [part.to(a.dtype, copy=True) for part, a in zip((*da_in.chunk(2), da_down), lora_a, strict=True)]
    if not need_drouter:
        return dx, da, [*db_in, *db_down], [], []
    dlogits = [*dlogits_in.unbind(1), *(dlogits_down.unbind(1) if own_router else ())]
    drouters = [*(d.clone() for d in drouter_in.chunk(min(routers, 2))), *((drouter_down,) if own_router else ())]
    return dx, da, [*db_in, *db_down], drouters, [d.sum(0) for d in dlogits]


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
