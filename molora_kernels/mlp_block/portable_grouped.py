"""The SwiGLU block in the grouped form, tokens sorted by set: what the ``torch`` backend runs where that is faster.

The mathematics is that of ``portable.py``. Each projection computes on rows in its own order, base and adapters alike,
so that experts add in place to what the frozen weights gave; h_gate and h_up are saved as they come. Rows change their
order inside the elementwise passes of SwiGLU, a few at a time, while they are in a core's cache. The routers' share of
dh and dx rides on the experts': their rows are E more columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from molora_kernels import workspace
from molora_kernels.dropout import Dropout, survivor_scale
from molora_kernels.grouped_lora import portable_grouped as lora
from molora_kernels.grouped_lora.order import Order, order_of
from molora_kernels.one_pass import one_pass
from molora_kernels.router import portable as router

GATE, UP, DOWN = range(3)


@workspace.scope()
def forward(
    x_TK: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    router_weights: list[Tensor],
    router_biases: list[Tensor],
    selection_biases: list[Tensor],
    mask_T: Tensor | None,
    dropout_seed: Tensor | None,
    top_k: int,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """As ``portable.forward``; h_gate, h_up and the shrinks are in the order of their projection."""

    def route(x: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bias = torch.stack(router_biases[part]) if router_biases else None
        selection = torch.stack(selection_biases[part]) if selection_biases else None
        return router.forward(x, torch.stack(router_weights[part]), bias, selection, mask_T, top_k)

    def project(i: int, x: Tensor, dropout: Dropout, order: Order, s_TC: Tensor, out: Tensor) -> Tensor:
        a_RK, b_RN = lora.adapters(lora_a[i], lora_b[i], x.dtype, dropout_p)
        rows = lora.sorted_rows(x, order)
        y = lora.base(rows, weights[i], biases[i] if biases else None, out)
        lora.shrink(dropout.drop_(rows, order.tokens), a_RK, order, out=s_TC)
        return lora.expand_(y, lora.gated(s_TC, order, scaling), b_RN, order)

    gates_in, logits_in, sums, counts = route(x_TK, slice(0, 2))
    gate_order, up_order = lora.orders_of(gates_in, 2, top_k)
    s_in = workspace.lasting(x_TK, len(x_TK), 2 * _columns(lora_a[GATE], gate_order))
    s_gate, s_up = s_in.view(2, len(x_TK), -1)
    dropout = Dropout(dropout_seed, dropout_p, stream=0)
    h_gate, h_up = (workspace.lasting(x_TK, len(x_TK), len(weights[i])) for i in (GATE, UP))
    project(GATE, x_TK, dropout, gate_order, s_gate, h_gate)
    project(UP, x_TK, dropout, up_order, s_up, h_up)

    h = workspace.empty(h_gate, *h_gate.shape)
    _swiglu(h, gate_order.positions(), up_order.positions(), h_gate, h_up)
    gates_down, logits_down, down_order = x_TK.new_empty(0), x_TK.new_empty(0), gate_order
    if len(router_weights) == 3:
        gates_down, logits_down, sums_down, counts_down = route(h, slice(2, 3))
        sums, counts = torch.cat([sums, sums_down]), torch.cat([counts, counts_down])
        down_order = order_of(gates_down[:, 0], top_k)
    s_down = h.new_empty(len(h), _columns(lora_a[DOWN], down_order))
    dropout = dropout._replace(stream=1)
    y = project(DOWN, h, dropout, down_order, s_down, workspace.empty(h, len(h), len(weights[DOWN])))
    y = torch.index_select(y, 0, down_order.positions(), out=workspace.lasting(y, *y.shape))
    return y, sums, counts, [h_gate, h_up, s_in, s_down, gates_in, logits_in, gates_down, logits_down]


@workspace.scope()
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
    """As ``portable.backward``."""
    h_gate, h_up, s_in, s_down, gates_in, logits_in, gates_down, logits_down = saved
    shared, dtype = len(router_weights) == 1, x_TK.dtype
    orders = lora.orders_of(gates_in, 2, top_k)
    orders.append(orders[GATE] if shared else order_of(gates_down[:, 0], top_k))
    shrinks = (*s_in.view(2, len(x_TK), -1), s_down)
    a_RK, b_RN = zip(*(lora.adapters(*ab, dtype, dropout_p) for ab in zip(lora_a, lora_b, strict=True)), strict=True)
    da, db = ([x_TK.new_empty(0)] * 3 if need_dlora else [] for _ in range(2))
    drouter = [(x_TK.new_empty(0), x_TK.new_empty(0))] * len(router_weights) if need_drouter else []

    def to_shrink(i: int, dy_VN: Tensor) -> tuple[Tensor, Tensor]:
        """ds and dgates; db on the way."""
        dgated = lora.shrink(dy_VN, b_RN[i], orders[i])
        ds, gated, own_dgates = lora.gate_backward(dgated, shrinks[i], orders[i], scaling)
        if need_dlora:
            db[i] = lora.adapter_grad(dy_VN, gated, orders[i], lora_b[i].dtype)[0].T.contiguous()
        dgates = torch.zeros_like(gates_in[:, 0])
        lora.add_dgates_(dgates, own_dgates, orders[i])
        return ds, dgates

    def to_input(i: int, dy_VN: Tensor, ds_VC: Tensor, dlogits_VE: Tensor | None, dropout: Dropout) -> Tensor:
        """Of the frozen weight, the experts and the router."""
        dx = torch.mm(dy_VN, weights[i], out=workspace.empty(dy_VN, len(dy_VN), a_RK[i].shape[1]))
        if dlogits_VE is not None and not dropout.p:
            columns, routers = torch.cat([ds_VC, dlogits_VE.to(dtype)], dim=1), router_weights[i].to(dtype)
            return lora.expand_(dx, columns, a_RK[i], orders[i], routers)
        if dlogits_VE is not None:
            dx.addmm_(dlogits_VE.to(dtype), router_weights[i].to(dtype))
        if not dropout.p:
            return lora.expand_(dx, ds_VC, a_RK[i], orders[i])
        own = lora.expand_(workspace.empty(dx, *dx.shape).zero_(), ds_VC, a_RK[i], orders[i])
        return dx.add_(dropout.drop_(own, orders[i].tokens))

    def to_weights(i: int, x_VK: Tensor, ds_VC: Tensor, dlogits_VE: Tensor | None, dropout: Dropout) -> None:
        """da and drouter; x is overwritten where there is dropout."""
        dlogits = None if dlogits_VE is None or not need_drouter else dlogits_VE[:, None]
        columns = None if dlogits is None or dropout.p or not need_dlora else router.columns_of(dlogits, dtype)
        if dlogits is not None and columns is None:
            drouter[i] = router.grads_of(dlogits, x_VK)[0]
        if need_dlora:
            dropout.drop_(x_VK, orders[i].tokens)
            own = ds_VC if columns is None else torch.cat([ds_VC, columns], dim=1)
            everyone = 0 if columns is None else columns.shape[1]
            products_RK, products_CK = lora.adapter_grad(x_VK, own, orders[i], lora_a[i].dtype, everyone)
            da[i] = products_RK.contiguous()
            if dropout.p:
                da[i].mul_(survivor_scale(dropout.p))
            if columns is not None and dlogits is not None:
                drouter[i] = router.grads_of_columns(products_CK, dlogits)[0]

    def dlogits_of(part: slice, dgates_THE: Tensor, logits_THE: Tensor, gates_THE: Tensor) -> Tensor:
        own = None if dsums is None else dsums[part]
        return router.dlogits_of(dgates_THE, own, logits_THE, gates_THE, mask_T, top_k)

    dy = lora.sorted_rows(dy_TK, orders[DOWN])
    ds, dgates_down = to_shrink(DOWN, dy)
    dlogits = None
    if not shared:
        dlogits = dlogits_of(slice(2, 3), dgates_down[:, None], logits_down, gates_down)
        dlogits = dlogits[:, 0].index_select(0, orders[DOWN].tokens)
    dropout = Dropout(dropout_seed, dropout_p, stream=1)
    dh = to_input(DOWN, dy, ds, dlogits, dropout)
    positions = [order.positions() for order in orders[:2]]
    h, *dh_in = (workspace.empty(h_gate, *h_gate.shape) for _ in range(3))
    _swiglu_backward(dh, *(rows.index_select(0, orders[DOWN].tokens) for rows in positions), h, h_gate, h_up, *dh_in)
    to_weights(DOWN, h, ds, dlogits, dropout)

    (ds_gate, dgates_gate), (ds_up, dgates_up) = (to_shrink(i, dh_in[i]) for i in (GATE, UP))
    if shared:
        of_gate = dlogits_of(slice(0, 1), (dgates_gate + dgates_up + dgates_down)[:, None], logits_in, gates_in)[:, 0]
        of_up = None
    else:
        dgates_in = torch.stack([dgates_gate, dgates_up], dim=1)
        of_gate, of_up = dlogits_of(slice(0, 2), dgates_in, logits_in, gates_in).unbind(1)
    dropout = dropout._replace(stream=0)
    dx_in = []
    for i, ds, dlogits in ((GATE, ds_gate, of_gate), (UP, ds_up, of_up)):
        dlogits = None if dlogits is None else dlogits.index_select(0, orders[i].tokens)
        if need_dx:
            dx_in.append(to_input(i, dh_in[i], ds, dlogits, dropout))
        if need_dlora or need_drouter:
            with workspace.scope():
                to_weights(i, lora.sorted_rows(x_TK, orders[i]), ds, dlogits, dropout)
    dx = x_TK.new_empty(0)
    if need_dx:
        dx = workspace.lasting(x_TK, *x_TK.shape)
        _add(dx, *positions, *dx_in)
    return dx, da, db, [weight for weight, _ in drouter], [bias for _, bias in drouter]


@one_pass(rows=3)
def _swiglu(out: Tensor, gate_rows: Tensor, up_rows: Tensor, h_gate: Tensor, h_up: Tensor) -> None:
    """``silu(h_gate) * h_up`` of these rows of each."""
    torch.mul(F.silu(h_gate.index_select(0, gate_rows)), h_up.index_select(0, up_rows), out=out)


@one_pass(rows=4)
def _swiglu_backward(
    dh: Tensor,
    gate_rows: Tensor,
    up_rows: Tensor,
    h: Tensor,
    h_gate: Tensor,
    h_up: Tensor,
    dh_gate: Tensor,
    dh_up: Tensor,
) -> None:
    """h in the order of dh; dh_gate and dh_up each in its own."""
    gate, up = h_gate.index_select(0, gate_rows), h_up.index_select(0, up_rows)
    silu = F.silu(gate)
    torch.mul(silu, up, out=h)
    dh_up.index_copy_(0, up_rows, silu * dh)
    dh_gate.index_copy_(0, gate_rows, torch.ops.aten.silu_backward(dh * up, gate))


@one_pass(rows=3)
def _add(out: Tensor, gate_rows: Tensor, up_rows: Tensor, of_gate: Tensor, of_up: Tensor) -> None:
    """The sum of these rows of each."""
    torch.add(of_gate.index_select(0, gate_rows), of_up.index_select(0, up_rows), out=out)


def _columns(lora_a_RK: Tensor, order: Order) -> int:
    """C of a projection."""
    return len(lora_a_RK) // order.total * order.experts.shape[1]
