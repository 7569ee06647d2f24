"""The grouped form of routed LoRA experts in plain PyTorch, hand-written backward.

Tokens of one group chose the same experts: these are one LoRA of narrow rank, computed on the rows of the group alone.
Each projection has groups of its own, from its own gates. The mathematics is that of ``portable.py``, and so are the
shape letters; k experts are chosen per token.
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
    """One (T, N) output per projection, and the ungated shrink (T, G * k * r) that backward needs."""
    assert gates_THE is not None, "plain LoRA is dense"
    dtype = x_TK.dtype
    dropped = portable.dropped(x_TK, portable.kept(x_TK, dropout_seed, dropout_p, stream), dropout_p)
    outputs, shrinks = [], []
    for g, (weight, a, b) in enumerate(zip(weights_NK, lora_a_RK, lora_b_NR, strict=True)):
        y = torch.mm(x_TK, weight.T) if not biases_N else torch.addmm(biases_N[g], x_TK, weight.T)
        gates = gates_THE[:, min(g, gates_THE.shape[1] - 1)]
        rank = a.shape[0] // gates.shape[1]
        for group in groups_of(gates, top_k):
            columns = _columns(group, rank, a.device)
            s = dropped[group.rows].mm(a[columns].to(dtype).T)
            y.index_add_(0, group.rows, _gated(s, gates, group, scaling).mm(b[:, columns].to(dtype).T))
            shrinks.append(s.flatten())
        outputs.append(y)
    return outputs, torch.cat([x_TK.new_empty(0), *shrinks]).view(x_TK.shape[0], -1)


def backward(
    dys_TN: list[Tensor],
    x_TK: Tensor,
    weights_NK: list[Tensor],
    lora_a_RK: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    s_TGkr: Tensor,
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
    assert gates_THE is not None, "plain LoRA is dense"
    dtype = x_TK.dtype
    kept = portable.kept(x_TK, dropout_seed, dropout_p, stream) if need_dlora or need_dx else None
    dropped = portable.dropped(x_TK, kept, dropout_p) if need_dlora else x_TK
    dx = torch.zeros_like(x_TK) if need_dx else x_TK.new_empty(0)
    da = [torch.zeros_like(a) if need_dlora else a.new_empty(0) for a in lora_a_RK]
    db = [torch.zeros_like(b) for b in lora_b_NR] if need_dlora else []
    dgates = torch.zeros_like(gates_THE) if need_dgates else x_TK.new_empty(0)
    left = s_TGkr.flatten()
    for g, (dy, a, b) in enumerate(zip(dys_TN, lora_a_RK, lora_b_NR, strict=True)):
        head = min(g, gates_THE.shape[1] - 1)
        gates = gates_THE[:, head]
        rank = a.shape[0] // gates.shape[1]
        for group in groups_of(gates, top_k):
            rows, columns = group.rows, _columns(group, rank, a.device)
            s, left = left.tensor_split([rows.numel() * columns.numel()])
            s, dy_rows = s.view(rows.numel(), columns.numel()), dy[rows]
            dgated = dy_rows.mm(b[:, columns].to(dtype))
            if need_dgates:
                products = dgated.to(gates.dtype) * s.to(gates.dtype)
                of_experts = products.view(rows.numel(), len(group.experts), rank).sum(-1).mul_(scaling)
                for e, column in zip(group.experts, of_experts.unbind(1), strict=True):
                    dgates[:, head, e].index_add_(0, rows, column)
            ds = _gated(dgated, gates, group, scaling)
            if need_dlora:
                db[g].index_add_(1, columns, dy_rows.T.mm(_gated(s, gates, group, scaling)).to(b.dtype))
                da[g].index_add_(0, columns, ds.T.mm(dropped[rows]).to(a.dtype))
            if need_dx:
                dx.index_add_(0, rows, ds.mm(a[columns].to(dtype)))
    if need_dx:
        dx = portable.dropped(dx, kept, dropout_p)
        for dy, weight in zip(dys_TN, weights_NK, strict=True):
            dx.addmm_(dy, weight)
    return dx, torch.cat(da) if need_dlora else x_TK.new_empty(0), db, dgates


def _columns(group: Group, rank: int, device: torch.device) -> Tensor:
    """Those of the shrink that belong to the group's experts."""
    starts = torch.tensor(group.experts, device=device) * rank
    return (starts[:, None] + torch.arange(rank, device=device)).flatten()


def _gated(s: Tensor, gates_TE: Tensor, group: Group, scaling: float) -> Tensor:
    """``scaling * gate * s`` of the group's rows, multiplied in the gates' precision and rounded once."""
    gates = gates_TE[group.rows][:, list(group.experts)].unsqueeze(1)
    return portable.gate(s, gates, 1, scaling)
