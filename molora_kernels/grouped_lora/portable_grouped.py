"""The grouped form of routed LoRA experts in plain PyTorch, hand-written backward.

Tokens of one group chose the same experts: these are one LoRA of narrow rank, computed on the rows of the group alone.
Each projection has an order of its own, from its own gates. The mathematics is that of ``portable.py``, and so are the
shape letters; k experts are chosen per token, V visits and C columns of the shrink are those of an order, n rows a
group's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora_kernels.grouped_lora import portable
from molora_kernels.grouped_lora.order import Group, Order, order_of


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
    top_k: int,
) -> tuple[list[Tensor], Tensor]:
    """One (T, N) output per projection, and the ungated shrinks (V, C) that backward needs, one projection's after
    another's in memory, as (T, G * k * r)."""
    orders, rank = _orders(gates_THE, len(lora_a_RK), lora_a_RK[0].shape[0], top_k)
    kept = portable.kept_of(x_TK, dropout_seed, dropout_p, stream)
    s = x_TK.new_empty(x_TK.shape[0], len(lora_a_RK) * top_k * rank)
    rows_room, adapters_room = _rooms(x_TK, weights_NK, orders, top_k * rank)
    outputs = []
    for g, (order, s_VC) in enumerate(zip(orders, _parts(s, orders, rank), strict=True)):
        a, b = portable.scaled(lora_a_RK[g], dropout_p).to(x_TK.dtype), lora_b_NR[g].to(x_TK.dtype)
        for group in order.groups:
            x_nK = _gathered(x_TK, group, rows_room, kept)
            torch.mm(x_nK, _of_experts(a, 0, group, rank, adapters_room).T, out=s_VC[group.visits])
        gated_VC = _gated(s_VC, order, scaling)
        w_KN = weights_NK[g].T
        y = torch.mm(x_TK, w_KN) if not biases_N else torch.addmm(biases_N[g], x_TK, w_KN)
        for group in order.groups:
            b_NC = _of_experts(b, 1, group, rank, adapters_room)
            y_nN = torch.mm(gated_VC[group.visits], b_NC.T, out=rows_room(len(group.tokens), len(b)))
            y.index_add_(0, group.tokens, y_nN)
        outputs.append(y)
    return outputs, s


def backward(
    dys_TN: list[Tensor],
    x_TK: Tensor,
    weights_NK: list[Tensor],
    lora_a_RK: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    s: Tensor,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    need_dx: bool,
    need_dlora: bool,
    need_dgates: bool,
    top_k: int,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """dx (T, K), da (G * R, K), db (N, R) per projection, dgates (T, H, E); what is not needed has zero elements."""
    assert gates_THE is not None
    R = lora_a_RK[0].shape[0]
    orders, rank = _orders(gates_THE, len(lora_a_RK), R, top_k)
    kept = portable.kept_of(x_TK, dropout_seed, dropout_p, stream) if need_dlora or need_dx else None
    rows_room, adapters_room = _rooms(x_TK, weights_NK, orders, top_k * rank)
    dx, da = x_TK.new_empty(0), x_TK.new_empty(0)  # two: an operator's outputs may not share memory
    if need_dlora:
        da = lora_a_RK[0].new_zeros(len(lora_a_RK) * R, x_TK.shape[1])
    db = [torch.zeros_like(b) for b in lora_b_NR] if need_dlora else []
    dgates = [gates.new_zeros(gates.shape) for gates in gates_THE.unbind(1)] if need_dgates else []

    for g, (dy, order, s_VC) in enumerate(zip(dys_TN, orders, _parts(s, orders, rank), strict=True)):
        a, b = portable.scaled(lora_a_RK[g], dropout_p).to(x_TK.dtype), lora_b_NR[g].to(x_TK.dtype)
        gated_VC, dgated_VC = _gated(s_VC, order, scaling), torch.empty_like(s_VC)
        for group in order.groups:
            dy_nN = _gathered(dy, group, rows_room)
            torch.mm(dy_nN, _of_experts(b, 1, group, rank, adapters_room), out=dgated_VC[group.visits])
            if need_dlora:
                db_NC = torch.mm(dy_nN.T, gated_VC[group.visits], out=adapters_room(len(b), gated_VC.shape[1]))
                for e, own in zip(group.experts, db_NC.split(rank, dim=1), strict=True):
                    db[g].narrow(1, e * rank, rank).add_(own)
        if need_dgates:
            own = portable.dgates_of(dgated_VC, s_VC, order.gates[:, None], 1, scaling)
            where = order.tokens[:, None] * gates_THE.shape[2] + order.experts
            dgates[min(g, len(dgates) - 1)].view(-1).index_add_(0, where.view(-1), own.view(-1))
        ds_VC = _gated(dgated_VC, order, scaling)
        if need_dx:
            dx = dx.addmm_(dy, weights_NK[g]) if g else dy.mm(weights_NK[g])
        for group in order.groups:
            ds_nC = ds_VC[group.visits]
            if need_dlora:
                x_nK = _gathered(x_TK, group, rows_room, kept)
                da_CK = torch.mm(ds_nC.T, x_nK, out=adapters_room(ds_nC.shape[1], x_nK.shape[1]))
                for e, own in zip(group.experts, da_CK.split(rank), strict=True):
                    da.narrow(0, g * R + e * rank, rank).add_(own)
            if need_dx:
                a_CK = _of_experts(a, 0, group, rank, adapters_room)
                dx_nK = torch.mm(ds_nC, a_CK, out=rows_room(len(group.tokens), a_CK.shape[1]))
                if kept is not None:
                    dx_nK.mul_(kept.index_select(0, group.tokens))
                dx.index_add_(0, group.tokens, dx_nK)
    return dx, portable.scaled(da, dropout_p), db, torch.stack(dgates, dim=1) if need_dgates else x_TK.new_empty(0)


class _Room:
    """Memory for one matrix at a time, allocated once: touching fresh pages would cost more than these products."""

    def __init__(self, like: Tensor, most: int) -> None:
        self.memory = like.new_empty(most)

    def __call__(self, rows: int, columns: int) -> Tensor:
        return self.memory[: rows * columns].view(rows, columns)


def _rooms(x_TK: Tensor, weights_NK: list[Tensor], orders: list[Order], columns: int) -> tuple[_Room, _Room]:
    """One for a group's rows of an input or output, one for A, B or a gradient of the group's experts."""
    widest = max(x_TK.shape[1], *(weight.shape[0] for weight in weights_NK))
    rows = max((len(group.tokens) for order in orders for group in order.groups), default=0)
    return _Room(x_TK, rows * widest), _Room(x_TK, columns * widest)


def _orders(gates_THE: Tensor | None, groups: int, R: int, top_k: int) -> tuple[list[Order], int]:
    """The order of each projection, and the rank of one expert."""
    assert gates_THE is not None, "plain LoRA is dense"
    _, heads, experts = gates_THE.shape
    orders = [order_of(gates, top_k) for gates in gates_THE.unbind(1)]
    return (orders if heads > 1 else orders * groups), R // experts


def _parts(s: Tensor, orders: list[Order], rank: int) -> Tensor:
    """The shrinks of the projections, (G, V, C)."""
    V, M = orders[0].experts.shape
    return s.view(len(orders), V, M * rank)


def _gathered(x: Tensor, group: Group, room: _Room, kept: Tensor | None = None) -> Tensor:
    """The group's rows of x, zero where a mask drops."""
    rows = torch.index_select(x, 0, group.tokens, out=room(len(group.tokens), x.shape[1]))
    return rows if kept is None else rows.mul_(kept.index_select(0, group.tokens))


def _of_experts(adapters: Tensor, dim: int, group: Group, rank: int, room: _Room) -> Tensor:
    """Those rows or columns of the adapters that are the group's experts'."""
    shape = list(adapters.shape)
    shape[dim] = len(group.experts) * rank
    return torch.cat([adapters.narrow(dim, e * rank, rank) for e in group.experts], dim, out=room(*shape))


def _gated(s_VC: Tensor, order: Order, scaling: float) -> Tensor:
    """``scaling * gate * s``, multiplied in the gates' precision and rounded once."""
    return portable.gate(s_VC, order.gates[:, None], 1, scaling)
