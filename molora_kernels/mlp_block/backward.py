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
from molora_kernels._triton.total import AS_PLANES, Kind, joined, totals
from molora_kernels.grouped_lora import backward as grouped_lora
from molora_kernels.grouped_lora import gating, grouped, tiles
from molora_kernels.grouped_lora.forward import rows_contiguous
from molora_kernels.grouped_lora.sets import Sets
from molora_kernels.mlp_block import portable
from molora_kernels.mlp_block.forward import BLOCK, DOWN, IN, TILES
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
    groups: list[list[Tensor]] = [lora_a[IN], lora_a[DOWN], *([b] for b in lora_b)]
    kinds: list[Kind] = [x_TK.dtype for _ in groups]
    for part in (router_weights[IN], router_weights[DOWN]):
        if part:
            groups.append(part)
            kinds.append(AS_PLANES if tiles.as_planes(sum(map(len, part)), x_TK.dtype) else torch.float32)
    a_in, a_down, *b, router_in, router_down = joined(groups, kinds) + [None] * (7 - len(groups))

    def adapter(part: slice, stream: int, gates: Tensor | None) -> _Adapter:
        sets = [] if form == "dense" or gates is None else grouped.sets_of_all(gates, top_k, x_TK.dtype)
        a, router = (a_in, router_in) if stream == 0 else (a_down, router_down)
        heads = len(router_weights[part])
        return _Adapter(a, b[part], router, heads, gates, sets, scaling, (dropout_seed, dropout_p, stream))

    def router_grads(logits: Tensor | None, more: Tensor | None, part: slice) -> gating.RouterGrads | None:
        if logits is None:
            return None
        as_planes = tiles.as_planes(logits.shape[1:].numel(), x_TK.dtype)
        return gating.RouterGrads(logits, more, None if dsums is None else dsums[part], mask, top_k, as_planes)

    # down, whose input gradient everything below needs
    down = adapter(DOWN, 1, gates_down if own_router else gates_in)
    ds, gated, dlogits_down = down.through_gates(
        [dy_TK], s_down, router_grads(logits_down, None, DOWN),
        need_ds=True, need_gated=need_dlora, need_dgates=need_dlogits,
    )  # fmt: skip
    own_dlogits = _columns(dlogits_down) if own_router else None
    dh = down.input_grad(ds, own_dlogits)
    dh.addmm_(dy_TK, weights[2])
    h, dh_gate, dh_up = swiglu_backward(h_gate, h_up, dh, need_h=need_dlora or (need_drouter and own_router))
    of_down = down.weight_terms(h, [dy_TK], ds, gated, own_dlogits, need_dlora, need_drouter and own_router)
    del h  # as wide as the block

    # gate and up
    gate_up = adapter(IN, 0, gates_in)
    more = None if own_router or not need_dlogits else dlogits_down  # a shared router's gates: down's share
    ds, gated, dlogits_in = gate_up.through_gates(
        [dh_gate, dh_up], s_in, router_grads(logits_in, more, IN),
        need_ds=need_dx or need_dlora, need_gated=need_dlora, need_dgates=need_dlogits,
    )  # fmt: skip
    columns = _columns(dlogits_in) if routers else None
    of_in = gate_up.weight_terms(x_TK, [dh_gate, dh_up], ds, gated, columns, need_dlora, need_drouter)
    dx = x_TK.new_empty(0)
    if need_dx:
        dx = gate_up.input_grad(ds, columns)
        dx.addmm_(dh_gate, weights[0]).addmm_(dh_up, weights[1])

    of_lora = [*of_in.a, *of_down.a, *of_in.b, *of_down.b]
    of_routers = [*of_in.routers, *of_down.routers]
    dtypes = [t.dtype for t in (*lora_a, *lora_b)][: len(of_lora)] + [torch.float32] * len(of_routers)
    found = totals([[one] for one in (*of_lora, *of_routers)], dtypes)
    da, db, drouters = found[: len(of_lora) // 2], found[len(of_lora) // 2 : len(of_lora)], found[len(of_lora) :]
    if not need_drouter:
        return dx, da, db, [], []
    of_biases = [*dlogits_in.unbind(-2), *(dlogits_down.unbind(-2) if own_router else ())]
    return dx, da, db, drouters, [d.sum(tuple(range(d.ndim - 1)), dtype=torch.float32) for d in of_biases]


def _columns(dlogits: Tensor) -> Tensor | None:
    """The routers' logits of a token side by side, (T, H * E) or (3, T, H * E) of planes; None if not needed."""
    return dlogits.flatten(-2) if dlogits.ndim > 1 else None


class _Terms(NamedTuple):
    """Of weights' gradients, each (splits, …) fp32; none of what is not needed."""

    a: list[Tensor]
    b: list[Tensor]
    routers: list[Tensor]


class _Adapter(NamedTuple):
    """Experts and routers of the projections that read one input, in the form that forward ran."""

    a: Tensor
    """(P, K) in the input's dtype"""
    b: list[Tensor]
    """(N, R) in the input's dtype"""
    routers: Tensor | None
    """(H * E, K) fp32 or (3, H * E, K), its planes, where they have their own"""
    heads: int
    """H of them"""
    gates: Tensor | None
    sets: list[Sets]
    """Of the grouped form; none in the dense one."""
    scaling: float
    drop: tuple[Tensor | None, float, int]

    def through_gates(
        self, dys: list[Tensor], s: Tensor, router: gating.RouterGrads | None, **need: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ds, the gated shrink, and dlogits, or dgates where the router is another's; see ``gating.gate_backward``."""
        if self.gates is None:
            return grouped_lora.unexpand(dys, self.b, s, self.scaling), s, s.new_empty(0)
        settings = (len(dys), self.scaling)
        if not self.sets:
            dgated = grouped_lora.unexpand(dys, self.b, s)
            return gating.gate_backward(dgated, s, self.gates, *settings, router=router, **need)
        dgated = grouped.unexpand(dys, self.b, self.sets)
        ds, gated, dgates = grouped.gate_backward(dgated, s, self.gates, self.sets, *settings, **need)
        if router and need["need_dgates"]:
            dgates = dgates if router.more_dgates is None else dgates + router.more_dgates
            dgates = dlogits_of(dgates, router.dsums, router.logits, self.gates, router.mask, router.top_k)
            dgates = joined([[dgates]], [AS_PLANES])[0] if router.as_planes else dgates
        return ds, gated, dgates

    def input_grad(self, ds: Tensor, dlogits: Tensor | None) -> Tensor:
        """What experts and routers contribute to the input's gradient."""
        if not self.sets:
            return grouped_lora.input_grad(ds, self.a, dlogits, self.routers, *self.drop)
        dx = None
        if dlogits is not None:  # a product with no experts: the routers' alone
            dx = grouped_lora.input_grad(ds[:, :0], self.a[:0], dlogits, self.routers, None, 0.0, 0)
        return grouped.input_grad(ds, list(self.a.chunk(len(self.b))), self.sets, dx, *self.drop)

    def weight_terms(
        self,
        x: Tensor,
        dys: list[Tensor],
        ds: Tensor,
        gated: Tensor,
        dlogits: Tensor | None,
        need_dlora: bool,
        need_drouter: bool,
    ) -> _Terms:
        """Of da and db of each projection, and of each router's weight."""
        dlogits = dlogits if need_drouter else None
        if not need_dlora:
            of_a, of_b, of_routers = [], [], grouped_lora.weight_terms(x, None, dlogits)[1]
        elif self.sets:
            of_a = grouped.shrink_terms(x, ds, self.sets, len(self.b), *self.drop)
            of_b = grouped.expand_terms(dys, gated, self.sets)
            of_routers = grouped_lora.weight_terms(x, None, dlogits)[1]
        else:
            of_all, of_routers = grouped_lora.weight_terms(x, ds, dlogits, *self.drop)
            of_a = list(of_all.chunk(len(self.b), 1))
            of_b = grouped_lora.expand_terms(dys, gated, self.scaling if self.gates is None else 1.0)
        return _Terms(of_a, of_b, [] if dlogits is None else list(of_routers.chunk(self.heads, 1)))


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
