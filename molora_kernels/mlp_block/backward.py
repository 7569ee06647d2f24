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

from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.tiles import Capability, cdiv, launching_on
from molora_kernels._triton.total import total
from molora_kernels.grouped_lora import backward as grouped_lora
from molora_kernels.grouped_lora import gating, grouped
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
    h, dh_gate, dh_up = swiglu_backward(h_gate, h_up, dh, need_h=need_dlora or (need_drouter and own_router))
    da_down, db_down, drouter_down = down.weight_grads(
        h, [dy_TK], given(ds, need_dlora), gated, own_dlogits if need_drouter else None
    )

    # gate and up
    part = slice(0, 2)
    gate_up = adapter(part, 0, gates_in)
    more = None if own_router or not need_dlogits else dlogits_down  # a shared router's gates: down's share
    ds, gated, dlogits_in = gate_up.through_gates(
        [dh_gate, dh_up], s_in, router_grads(logits_in, more, part),
        need_ds=need_dx or need_dlora, need_gated=need_dlora, need_dgates=need_dlogits,
    )  # fmt: skip
    da_in, db_in, drouter_in = gate_up.weight_grads(
        x_TK, [dh_gate, dh_up], given(ds, need_dlora), gated, given(dlogits_in, need_drouter)
    )
    dx = x_TK.new_empty(0)
    if need_dx:
        dx = gate_up.input_grad(ds, given(dlogits_in))
        dx.addmm_(dh_gate, weights[0]).addmm_(dh_up, weights[1])

    da, db = [*da_in, *da_down], [*db_in, *db_down]
    if not need_drouter:
        return dx, da, db, [], []
    dlogits = [*dlogits_in.unbind(1), *(dlogits_down.unbind(1) if own_router else ())]
    drouters = [*drouter_in.chunk(min(routers, 2), 1), *((drouter_down,) if own_router else ())]
    return dx, da, db, [total(d, torch.float32) for d in drouters], [d.sum(0) for d in dlogits]


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

    def weight_grads(
        self, x: Tensor, dys: list[Tensor], ds: Tensor | None, gated: Tensor, dlogits: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """da and db per projection, in their own dtypes, if ds is given; if dlogits, the terms of the routers' (splits,
        H * E, K) fp32."""
        if ds is None:
            return [], [], grouped_lora.weight_partials(x, None, dlogits)[1]
        if not self.sets:
            partials, router_partials = grouped_lora.weight_partials(x, ds, dlogits, *self.drop)
            parts = partials.chunk(len(self.lora_a), 1)
            das = [total(part, a.dtype) for part, a in zip(parts, self.lora_a, strict=True)]
            return das, grouped_lora.expand_grads(dys, gated, self.lora_b), router_partials
        das = grouped.shrink_grads(x, ds, self.lora_a, self.sets, *self.drop)
        dbs = grouped.expand_grads(dys, gated, self.lora_b, self.sets)
        return das, dbs, grouped_lora.weight_partials(x, None, dlogits)[1]


def swiglu_backward(h_gate: Tensor, h_up: Tensor, dh: Tensor, *, need_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h (empty if not needed), dh_gate, dh_up; dh_up takes dh's memory."""
    h = torch.empty_like(dh) if need_h else None
    dh_gate, n = torch.empty_like(dh), dh.numel()
    if n:
        with launching_on(dh.device):
            swiglu_bwd_kernel[(cdiv(n, BLOCK),)](
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
