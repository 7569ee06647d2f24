"""The grouped form of routed LoRA experts in plain PyTorch, hand-written backward.

Tokens of one group chose the same experts: these are one LoRA of narrow rank, computed on the rows of the group alone.
Each projection has groups of its own, from its own gates. The mathematics is that of ``portable.py``, and so are the
shape letters; k experts are chosen per token, n rows and C columns of the shrink are those of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora_kernels.grouped_lora import portable
from molora_kernels.grouped_lora.order import Group, groups_of


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
    """One (T, N) output per projection, and the ungated shrink (T, G * k * r) that backward needs: that of each group
    as one run of memory, group after group, projection after projection."""
    groups, rank = _groups(gates_THE, lora_a_RK, top_k)
    kept = portable.kept_of(x_TK, dropout_seed, dropout_p, stream)
    s = x_TK.new_empty(x_TK.shape[0], len(weights_NK) * top_k * rank)
    left = s.view(-1)
    x_room, y_room, a_room, b_room = _rooms(x_TK, weights_NK, groups, rank)
    outputs = []
    for g, (weight, a, b) in enumerate(zip(weights_NK, lora_a_RK, lora_b_NR, strict=True)):
        a, b = portable.scaled(a, dropout_p).to(x_TK.dtype), b.to(x_TK.dtype)
        y = torch.mm(x_TK, weight.T) if not biases_N else torch.addmm(biases_N[g], x_TK, weight.T)
        for group in groups[g]:
            n, C = len(group.rows), len(group.experts) * rank
            s_nC, left = left[: n * C].view(n, C), left[n * C :]
            x_nK = _gathered(x_TK, group, x_room, kept)
            torch.mm(x_nK, _of_experts(a, 0, group, rank, a_room).T, out=s_nC)
            b_NC = _of_experts(b, 1, group, rank, b_room)
            y_nN = torch.mm(_gated(s_nC, group, scaling), b_NC.T, out=y_room(n, y.shape[1]))
            y.index_add_(0, group.rows, y_nN)
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
    groups, rank = _groups(gates_THE, lora_a_RK, top_k)
    kept = portable.kept_of(x_TK, dropout_seed, dropout_p, stream) if need_dlora or need_dx else None
    dx, da, left = x_TK.new_empty(0), x_TK.new_empty(0), s.view(-1)
    if need_dlora:
        da = lora_a_RK[0].new_zeros(sum(a.shape[0] for a in lora_a_RK), x_TK.shape[1])
    db = [torch.zeros_like(b) for b in lora_b_NR] if need_dlora else []
    dgates = [torch.zeros_like(gates) for gates in gates_THE.unbind(1)] if need_dgates else []
    x_room, dy_room, a_room, b_room = _rooms(x_TK, weights_NK, groups, rank)
    for g, (dy, weight, a, b) in enumerate(zip(dys_TN, weights_NK, lora_a_RK, lora_b_NR, strict=True)):
        a, b = portable.scaled(a, dropout_p).to(x_TK.dtype), b.to(x_TK.dtype)
        if need_dx:
            dx = dx.addmm_(dy, weight) if g else dy.mm(weight)
        for group in groups[g]:
            n, C = len(group.rows), len(group.experts) * rank
            s_nC, left = left[: n * C].view(n, C), left[n * C :]
            dy_nN = _gathered(dy, group, dy_room)
            dgated_nC = dy_nN.mm(_of_experts(b, 1, group, rank, b_room))
            if need_dgates:
                own = portable.dgates_of(dgated_nC, s_nC, group.gates[:, None], 1, scaling)[:, 0]
                wide = own.new_zeros(n, gates_THE.shape[2]).index_copy_(1, group.columns, own)
                dgates[min(g, len(dgates) - 1)].index_add_(0, group.rows, wide)
            ds_nC = _gated(dgated_nC, group, scaling)
            if need_dlora:
                x_nK = _gathered(x_TK, group, x_room, kept)
                da_CK = torch.mm(ds_nC.T, x_nK, out=a_room(C, x_nK.shape[1]))
                db_NC = torch.mm(dy_nN.T, _gated(s_nC, group, scaling), out=b_room(dy_nN.shape[1], C))
                for i, e in enumerate(group.experts):
                    da.narrow(0, g * a.shape[0] + e * rank, rank).add_(da_CK.narrow(0, i * rank, rank))
                    db[g].narrow(1, e * rank, rank).add_(db_NC.narrow(1, i * rank, rank))
            if need_dx:
                dx_nK = torch.mm(ds_nC, _of_experts(a, 0, group, rank, a_room), out=x_room(n, x_TK.shape[1]))
                if kept is not None:
                    dx_nK.mul_(kept.index_select(0, group.rows))
                dx.index_add_(0, group.rows, dx_nK)
    return dx, portable.scaled(da, dropout_p), db, torch.stack(dgates, dim=1) if need_dgates else x_TK.new_empty(0)


class _Room:
    """Memory for one matrix at a time, allocated once: touching fresh pages would cost more than these products."""

    def __init__(self, like: Tensor, most: int) -> None:
        self.memory = like.new_empty(most)

    def __call__(self, rows: int, columns: int) -> Tensor:
        return self.memory[: rows * columns].view(rows, columns)


def _rooms(x_TK: Tensor, weights_NK: list[Tensor], groups: list[list[Group]], rank: int) -> tuple[_Room, ...]:
    """Two for rows of any projection's input or output, one for A and one for B of a group's experts."""
    widest = max(x_TK.shape[1], *(weight.shape[0] for weight in weights_NK))
    every = [group for of_projection in groups for group in of_projection]
    rows = max((len(group.rows) for group in every), default=0) * widest
    adapters = max((len(group.experts) for group in every), default=0) * rank * widest
    return tuple(_Room(x_TK, most) for most in (rows, rows, adapters, adapters))


def _groups(gates_THE: Tensor | None, lora_a_RK: list[Tensor], top_k: int) -> tuple[list[list[Group]], int]:
    """The groups of each projection, and the rank of one expert."""
    assert gates_THE is not None, "plain LoRA is dense"
    _, heads, experts = gates_THE.shape
    groups = [groups_of(gates, top_k) for gates in gates_THE.unbind(1)]
    return (groups if heads > 1 else groups * len(lora_a_RK)), lora_a_RK[0].shape[0] // experts


def _gathered(x: Tensor, group: Group, room: _Room, kept: Tensor | None = None) -> Tensor:
    """The group's rows of x, zero where a mask drops."""
    rows = torch.index_select(x, 0, group.rows, out=room(len(group.rows), x.shape[1]))
    return rows if kept is None else rows.mul_(kept.index_select(0, group.rows))


def _of_experts(adapters: Tensor, dim: int, group: Group, rank: int, room: _Room) -> Tensor:
    """Those rows or columns of the adapters that are the group's experts'."""
    shape = list(adapters.shape)
    shape[dim] = len(group.experts) * rank
    return torch.cat([adapters.narrow(dim, e * rank, rank) for e in group.experts], dim, out=room(*shape))


def _gated(s_nC: Tensor, group: Group, scaling: float) -> Tensor:
    """``scaling * gate * s``, multiplied in the gates' precision and rounded once."""
    return portable.gate(s_nC, group.gates[:, None], 1, scaling)
