"""Projections with routed LoRA experts in plain PyTorch, hand-written backward: the ``torch`` backend's dense form.

The experts of a projection are one LoRA of rank R = E * r whose intermediate is multiplied by the gates; the
projections that read the same input are one shrink of G * R columns. Shape letters as in ``reference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora_kernels import workspace
from molora_kernels.cpu import has_amx
from molora_kernels.dropout import Dropout, survivor_scale
from molora_kernels.one_pass import one_pass


@workspace.scope()
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
) -> tuple[list[Tensor], Tensor]:
    """One (T, N) output per projection, and the ungated shrink s (T, G * R) that backward needs."""
    dtype, dropout = x_TK.dtype, Dropout(dropout_seed, dropout_p, stream)
    a_RK = scaled(torch.cat(lora_a_RK), dropout_p).to(dtype)
    s = torch.mm(dropout.dropped(x_TK), a_RK.T, out=workspace.lasting(x_TK, len(x_TK), len(a_RK)))
    groups = len(lora_b_NR)
    gated = gate(s, gates_THE, groups, scaling)
    outputs = []
    for g, b in enumerate(lora_b_NR):
        part, b_RN = _part(gated, g, groups), b.to(dtype).T
        y = workspace.lasting(x_TK, len(x_TK), len(b))
        if not weights_NK:
            torch.mm(part, b_RN, out=y)
        elif not biases_N:
            torch.mm(x_TK, weights_NK[g].T, out=y).addmm_(part, b_RN)
        else:
            torch.addmm(biases_N[g], x_TK, weights_NK[g].T, out=y).addmm_(part, b_RN)
        outputs.append(y)
    return outputs, s


@workspace.scope()
def backward(
    dys_TN: list[Tensor],
    x_TK: Tensor,
    weights_NK: list[Tensor],
    lora_a_RK: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    s_TGR: Tensor,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    need_dx: bool,
    need_dlora: bool,
    need_dgates: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """dx (T, K), da (G * R, K), db (N, R) per projection, dgates (T, H, E); whatever is not needed has zero elements.

    With S the ungated shrink and c = scaling * gate: ``y = x W^T + (c S) B^T``, so
    ``d(cS) = dy B``, ``dB = dy^T (c S)``, ``dgate_e = scaling * <d(cS)_e, S_e>``, ``dS = c d(cS)``,
    ``dA = dS^T dropout(x)`` and ``dx = dy W + dropout(dS A)``.
    """
    dropout = Dropout(dropout_seed, dropout_p, stream)
    ds, db, dgates = to_shrink(dys_TN, lora_b_NR, gates_THE, s_TGR, scaling, need_dlora, need_dgates)
    dx, da = x_TK.new_empty(0), x_TK.new_empty(0)
    if need_dx:
        dx = to_input(dys_TN, weights_NK, lora_a_RK, ds, dropout, out=workspace.lasting(x_TK, *x_TK.shape))
    if need_dlora:
        da, _ = to_adapter(x_TK, ds, dropout, lora_a_RK[0].dtype)
    return dx, da, db, dgates


def to_shrink(
    dys_TN: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    s_TGR: Tensor,
    scaling: float,
    need_dlora: bool,
    need_dgates: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """ds (T, G * R), and db and dgates as in :func:`backward`."""
    dtype, groups = s_TGR.dtype, len(lora_b_NR)
    dgated = torch.cat([dy.mm(b.to(dtype)) for dy, b in zip(dys_TN, lora_b_NR, strict=True)], dim=1)
    ds, gated, dgates = gate_backward(dgated, s_TGR, gates_THE, groups, scaling)
    db: list[Tensor] = []
    if need_dlora:
        db = [
            over_rows(dy, _part(gated, g, groups)).T.to(b.dtype).contiguous()
            for g, (dy, b) in enumerate(zip(dys_TN, lora_b_NR, strict=True))
        ]
    return ds, db, dgates if need_dgates else dgated.new_empty(0)


def to_input(
    dys_TN: list[Tensor],
    weights_NK: list[Tensor],
    lora_a_RK: list[Tensor],
    ds_TGR: Tensor,
    dropout: Dropout,
    out: Tensor,
    dlogits_TE: Tensor | None = None,
    router_weights_EK: Tensor | None = None,
) -> Tensor:
    """dx (T, K) in ``out``: of the frozen weights, the experts and, if given, the routers."""
    columns, rows = [ds_TGR], [scaled(torch.cat(lora_a_RK), dropout.p).to(out.dtype)]
    terms = list(zip(dys_TN, weights_NK, strict=True)) if weights_NK else []
    if dlogits_TE is not None and router_weights_EK is not None:
        routers = dlogits_TE.to(out.dtype), router_weights_EK.to(out.dtype)
        if dropout.p:  # which drops what the experts give, not what the routers do
            terms.append(routers)
        else:
            columns, rows = [*columns, routers[0]], [*rows, routers[1]]
    dropout.drop_(torch.mm(torch.cat(columns, dim=1), torch.cat(rows), out=out))
    for dy, weight in terms:
        out.addmm_(dy, weight)
    return out


def to_adapter(
    x_TK: Tensor, ds_TGR: Tensor, dropout: Dropout, dtype: torch.dtype, columns_TC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """da (G * R, K), and (C, K), the transposed product of x^T with ``columns``, which are others'."""
    if columns_TC is None:
        columns_TC = ds_TGR[:, :0]
    if dropout.p:
        da, others_CK = over_rows(dropout.dropped(x_TK), ds_TGR), over_rows(x_TK, columns_TC)
    else:
        both = over_rows(x_TK, torch.cat([ds_TGR, columns_TC], dim=1))
        da, others_CK = both.split([ds_TGR.shape[1], columns_TC.shape[1]])
    return scaled(da.to(dtype), dropout.p).clone(memory_format=torch.contiguous_format), others_CK


def over_rows(rows_TF: Tensor, columns_TC: Tensor) -> Tensor:
    """(C, F): ``columns^T rows``. MKL takes up to 1.4 times as long for the one order of rows and columns in the result
    as for the other; with AMX the rows are better the columns', else the features (docs/log.md)."""
    return columns_TC.T.mm(rows_TF) if has_amx() else rows_TF.T.mm(columns_TC).T


def gate(s_TGR: Tensor, gates_THE: Tensor | None, groups: int, scaling: float) -> Tensor:
    """``scaling * gate * s``, multiplied in the gates' precision and rounded once."""
    if gates_THE is None:
        return s_TGR * scaling
    tokens, columns = s_TGR.shape
    experts = gates_THE.shape[-1]
    s = s_TGR.view(tokens, groups, experts, columns // (groups * experts))
    return (s * (gates_THE * scaling).unsqueeze(-1)).to(s_TGR.dtype).view(s_TGR.shape)


def gate_backward(
    dgated_TGR: Tensor, s_TGR: Tensor, gates_THE: Tensor | None, groups: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ds; the gated shrink again; dgates (T, H, E): per expert the inner product of the gated shrink's gradient with
    the shrink."""
    if gates_THE is None:
        return dgated_TGR * scaling, s_TGR * scaling, dgated_TGR.new_empty(0)
    tokens, heads, experts = gates_THE.shape
    c_TE = (gates_THE * scaling).expand(tokens, groups, experts).reshape(tokens, groups * experts)
    ds, gated, dgates_TE = torch.empty_like(dgated_TGR), torch.empty_like(s_TGR), torch.empty_like(c_TE)
    shape = (tokens, groups * experts, s_TGR.shape[1] // (groups * experts))
    _gate_backward(*(t.view(shape) for t in (dgated_TGR, s_TGR, ds, gated)), c_TE[:, :, None], dgates_TE)
    dgates = dgates_TE.mul_(scaling).view(tokens, groups, experts)
    return ds, gated, dgates if heads == groups else dgates.sum(1, keepdim=True)


@one_pass(rows=6)
def _gate_backward(dgated: Tensor, s: Tensor, ds: Tensor, gated: Tensor, c: Tensor, dgates: Tensor) -> None:
    ds.copy_(dgated * c)
    gated.copy_(s * c)
    dgates.copy_((dgated.to(c.dtype) * s.to(c.dtype)).sum(-1))


def _part(columns_TGR: Tensor, g: int, groups: int) -> Tensor:
    return columns_TGR if groups == 1 else columns_TGR.chunk(groups, dim=1)[g]


def scaled(a: Tensor, p: float) -> Tensor:
    """A, or its gradient, times what dropout's survivors are multiplied by: that is smaller than x by far."""
    return a * survivor_scale(p) if p else a
