"""Projections with routed LoRA experts in plain PyTorch, hand-written backward: the ``torch`` backend's dense form.

The experts of a projection are one LoRA of rank R = E * r whose intermediate is multiplied by the gates; the
projections that read the same input are one shrink of G * R columns. Shape letters as in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    s = shrink(x_TK, lora_a_RK, Dropout(dropout_seed, dropout_p, stream))
    return expand(x_TK, weights_NK, biases_N, lora_b_NR, s, gates_THE, scaling), s


def shrink(x_TK: Tensor, lora_a_RK: list[Tensor], dropout: Dropout) -> Tensor:
    """The ungated shrink s (T, G * R), to be returned or saved."""
    a_RK = joined(lora_a_RK, x_TK.dtype, survivor_scale(dropout.p))
    return torch.mm(dropout.dropped(x_TK), a_RK.T, out=workspace.lasting(x_TK, len(x_TK), len(a_RK)))


def expand(
    x_TK: Tensor,
    weights_NK: list[Tensor],
    biases_N: list[Tensor],
    lora_b_NR: list[Tensor],
    s_TGR: Tensor,
    gates_THE: Tensor | None,
    scaling: float,
) -> list[Tensor]:
    """One (T, N) output per projection."""
    dtype, groups = x_TK.dtype, len(lora_b_NR)
    gated = gate(s_TGR, gates_THE, groups, scaling)
    outputs = []
    for g, b in enumerate(lora_b_NR):
        part, b_RN = _part(gated, g, groups), workspace.cast(b, dtype).T
        y = workspace.lasting(x_TK, len(x_TK), len(b))
        if not weights_NK:
            torch.mm(part, b_RN, out=y)
        elif not biases_N:
            torch.mm(x_TK, weights_NK[g].T, out=y).addmm_(part, b_RN)
        else:
            torch.addmm(biases_N[g], x_TK, weights_NK[g].T, out=y).addmm_(part, b_RN)
        outputs.append(y)
    return outputs


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
        da = lora_a_RK[0].new_empty(ds.shape[1], x_TK.shape[1])
        to_adapter(x_TK, ds, dropout, out=list(da.chunk(len(lora_a_RK))))
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
    dgated = workspace.empty(s_TGR, *s_TGR.shape)
    for g, (dy, b) in enumerate(zip(dys_TN, lora_b_NR, strict=True)):
        torch.mm(dy, workspace.cast(b, dtype), out=_part(dgated, g, groups))
    ds, gated, dgates = gate_backward(dgated, s_TGR, gates_THE, groups, scaling)
    db: list[Tensor] = []
    if need_dlora:
        db = [
            b.new_empty(b.shape).copy_(over_rows(dy, _part(gated, g, groups)).T)
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
    columns, rows = ds_TGR, lora_a_RK
    terms = list(zip(dys_TN, weights_NK, strict=True)) if weights_NK else []
    if dlogits_TE is not None and router_weights_EK is not None:
        dlogits = dlogits_TE.to(out.dtype)
        if dropout.p:  # which drops what the experts give, not what the routers do
            terms.append((dlogits, router_weights_EK.to(out.dtype)))
        else:
            columns, rows = torch.cat([ds_TGR, dlogits], dim=1), [*lora_a_RK, router_weights_EK]
    dropout.drop_(torch.mm(columns, joined(rows, out.dtype, survivor_scale(dropout.p)), out=out))
    for dy, weight in terms:
        out.addmm_(dy, weight)
    return out


def to_adapter(
    x_TK: Tensor, ds_TGR: Tensor, dropout: Dropout, out: list[Tensor], columns_TC: Tensor | None = None
) -> Tensor:
    """da (R, K) of each projection in ``out``. Returns (C, K) in the workspace: the transposed product of x^T with
    ``columns``, which are others'."""
    others = () if columns_TC is None else (columns_TC,)
    if dropout.p:
        da, others_CK = over_rows(dropout.dropped(x_TK), ds_TGR), over_rows(x_TK, *others)
    else:
        da, others_CK = over_rows(x_TK, ds_TGR, *others).tensor_split([ds_TGR.shape[1]])
    for own, part in zip(out, da.chunk(len(out)), strict=True):
        own.copy_(part)
        if dropout.p:
            own.mul_(survivor_scale(dropout.p))
    return others_CK


def over_rows(rows_TF: Tensor, *columns_TC: Tensor) -> Tensor:
    """(C, F) in the workspace: ``columns^T rows`` of all columns, one set's after another's.

    MKL takes up to 1.4 times as long for the one order of rows and columns in the result as for the other; with AMX
    the rows are better the columns', else the features. There 16-bit products take up to 1.6 times as long if the
    columns have to be read across, so they are written across first (docs/log.md).
    """
    tokens, features = rows_TF.shape
    sizes = [columns.shape[1] for columns in columns_TC]
    if has_amx() and rows_TF.dtype.itemsize == 2:
        columns_CT = workspace.empty(rows_TF, sum(sizes), tokens)
        for columns, part_CT in zip(columns_TC, columns_CT.split(sizes), strict=True):
            part_CT.copy_(columns.T)
        return torch.mm(columns_CT, rows_TF, out=workspace.empty(rows_TF, sum(sizes), features))
    columns = columns_TC[0] if len(sizes) == 1 else torch.cat([rows_TF[:, :0], *columns_TC], dim=1)
    if has_amx():
        return torch.mm(columns.T, rows_TF, out=workspace.empty(rows_TF, sum(sizes), features))
    return torch.mm(rows_TF.T, columns, out=workspace.empty(rows_TF, features, sum(sizes))).T


def over_groups(rows_VF: Tensor, columns_VC: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """What :func:`over_rows` gives for each group of so many rows, one after another in the same memory."""
    of_group = columns_VC.split(sizes)
    if has_amx():
        for rows, columns in zip(rows_VF.split(sizes), of_group, strict=True):
            with workspace.scope():
                yield over_rows(rows, columns)
    else:
        room_FC = workspace.empty(rows_VF, rows_VF.shape[1], columns_VC.shape[1])
        products_CF = room_FC.T
        for rows, columns in zip(rows_VF.T.split(sizes, dim=1), of_group, strict=True):
            torch.mm(rows, columns, out=room_FC)
            yield products_CF


def zeros_over_rows(rows_TF: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """(C, F), laid out as what :func:`over_rows` gives, to add that to."""
    shape = columns, rows_TF.shape[1]
    return rows_TF.new_zeros(shape, dtype=dtype) if has_amx() else rows_TF.new_zeros(shape[::-1], dtype=dtype).T


def gate(s_TGR: Tensor, gates_THE: Tensor | None, groups: int, scaling: float) -> Tensor:
    """``scaling * gate * s``, multiplied in the gates' precision and rounded once; in the workspace if there are
    gates."""
    if gates_THE is None:
        return s_TGR * scaling
    c_TE, gated = _coefficients(gates_THE, groups, scaling), workspace.empty(s_TGR, *s_TGR.shape)
    s, out = _by_expert(c_TE, s_TGR, gated)
    torch.mul(s, c_TE[:, :, None], out=out)
    return gated


def gate_backward(
    dgated_TGR: Tensor, s_TGR: Tensor, gates_THE: Tensor | None, groups: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ds; the gated shrink again; dgates (T, H, E): per expert the inner product of the gated shrink's gradient with
    the shrink. The first two in the workspace if there are gates."""
    if gates_THE is None:
        return dgated_TGR * scaling, s_TGR * scaling, dgated_TGR.new_empty(0)
    c_TE = _coefficients(gates_THE, groups, scaling)
    ds, gated = (workspace.empty(s_TGR, *s_TGR.shape) for _ in range(2))
    dgates_TE = torch.empty_like(c_TE)
    _gate_backward(*_by_expert(c_TE, dgated_TGR, s_TGR, ds, gated), c_TE[:, :, None], dgates_TE)
    dgates = dgates_TE.mul_(scaling).view(len(c_TE), groups, gates_THE.shape[2])
    return ds, gated, dgates if gates_THE.shape[1] == groups else dgates.sum(1, keepdim=True)


@one_pass(rows=6)
def _gate_backward(dgated: Tensor, s: Tensor, ds: Tensor, gated: Tensor, c: Tensor, dgates: Tensor) -> None:
    ds.copy_(dgated * c)
    gated.copy_(s * c)
    dgates.copy_((dgated.to(c.dtype) * s.to(c.dtype)).sum(-1))


def _coefficients(gates_THE: Tensor, groups: int, scaling: float) -> Tensor:
    """(T, G * E): what the columns of each expert are multiplied by."""
    tokens, _, experts = gates_THE.shape
    return (gates_THE * scaling).expand(tokens, groups, experts).reshape(tokens, groups * experts)


def _by_expert(c_TE: Tensor, *columns_TGR: Tensor) -> list[Tensor]:
    """The columns of each expert apart: (T, G * E, r)."""
    return [columns.view(*c_TE.shape, columns.shape[1] // c_TE.shape[1]) for columns in columns_TGR]


def _part(columns_TGR: Tensor, g: int, groups: int) -> Tensor:
    return columns_TGR if groups == 1 else columns_TGR.chunk(groups, dim=1)[g]


def joined(adapters_RF: list[Tensor], dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """The rows of all of them in ``dtype``, times ``factor`` (what dropout's survivors are multiplied by: adapters are
    smaller than x by far): in the workspace, or the one there is as it is."""
    if len(adapters_RF) == 1 and factor == 1:
        return workspace.cast(adapters_RF[0], dtype)
    sizes = [len(a) for a in adapters_RF]
    rows = workspace.empty(adapters_RF[0], sum(sizes), adapters_RF[0].shape[1], dtype=dtype)
    for part, a in zip(rows.split(sizes), adapters_RF, strict=True):
        part.copy_(a if factor == 1 else a.to(torch.promote_types(a.dtype, dtype)) * factor)
    return rows
