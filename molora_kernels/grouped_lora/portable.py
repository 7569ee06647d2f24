"""Projections with routed LoRA experts in plain PyTorch, hand-written backward: the ``torch`` backend's dense form.

The experts of a projection are one LoRA of rank R = E * r whose intermediate is multiplied by the gates; the
projections that read the same input are one shrink of G * R columns. Shape letters as in ``reference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora_kernels import workspace
from molora_kernels.dropout import dropout_mask, survivor_scale


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
    dtype = x_TK.dtype
    kept = kept_of(x_TK, dropout_seed, dropout_p, stream)
    s = _masked(x_TK, kept).mm(scaled(torch.cat(lora_a_RK), dropout_p).to(dtype).T)
    groups = len(lora_b_NR)
    gated = gate(s, gates_THE, groups, scaling)
    outputs = []
    for g, b in enumerate(lora_b_NR):
        part, b_RN = _part(gated, g, groups), b.to(dtype).T
        if not weights_NK:
            outputs.append(torch.mm(part, b_RN))
            continue
        w_KN = weights_NK[g].T
        y = torch.mm(x_TK, w_KN) if not biases_N else torch.addmm(biases_N[g], x_TK, w_KN)
        outputs.append(y.addmm_(part, b_RN))
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
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """dx (T, K), in ``out`` if given, da (G * R, K), db (N, R) per projection, dgates (T, H, E); whatever is not needed
    has zero elements.

    With S the ungated shrink and c = scaling * gate: ``y = x W^T + (c S) B^T``, so
    ``d(cS) = dy B``, ``dB = dy^T (c S)``, ``dgate_e = scaling * <d(cS)_e, S_e>``, ``dS = c d(cS)``,
    ``dA = dS^T dropout(x)`` and ``dx = dy W + dropout(dS A)``.
    """
    dtype, groups = x_TK.dtype, len(lora_b_NR)
    dgated = torch.cat([dy.mm(b.to(dtype)) for dy, b in zip(dys_TN, lora_b_NR, strict=True)], dim=1)
    dgates = x_TK.new_empty(0)
    if need_dgates and gates_THE is not None:
        dgates = dgates_of(dgated, s_TGR, gates_THE, groups, scaling)

    db: list[Tensor] = []
    if need_dlora:
        gated = gate(s_TGR, gates_THE, groups, scaling)
        db = [
            dy.T.mm(_part(gated, g, groups)).to(b.dtype)
            for g, (dy, b) in enumerate(zip(dys_TN, lora_b_NR, strict=True))
        ]

    ds = gate(dgated, gates_THE, groups, scaling)
    kept = kept_of(x_TK, dropout_seed, dropout_p, stream) if need_dlora or need_dx else None
    da = x_TK.new_empty(0)
    if need_dlora:
        da_KR = _masked(x_TK, kept).T.mm(ds)  # features as rows: the other way takes a third longer
        da = scaled(da_KR.T.to(lora_a_RK[0].dtype).contiguous(), dropout_p)

    dx = x_TK.new_empty(0)
    if need_dx:
        dx = torch.empty_like(x_TK) if out is None else out
        torch.mm(ds, scaled(torch.cat(lora_a_RK), dropout_p).to(dtype), out=dx)
        if kept is not None:
            dx.mul_(kept)
        for dy, weight in zip(dys_TN, weights_NK, strict=bool(weights_NK)):
            dx.addmm_(dy, weight)
    return dx, da, db, dgates


def gate(s_TGR: Tensor, gates_THE: Tensor | None, groups: int, scaling: float) -> Tensor:
    """``scaling * gate * s``, multiplied in the gates' precision and rounded once."""
    if gates_THE is None:
        return s_TGR * scaling
    tokens, columns = s_TGR.shape
    experts = gates_THE.shape[-1]
    s = s_TGR.view(tokens, groups, experts, columns // (groups * experts))
    return (s * (gates_THE * scaling).unsqueeze(-1)).to(s_TGR.dtype).view(s_TGR.shape)


def dgates_of(dgated_TGR: Tensor, s_TGR: Tensor, gates_THE: Tensor, groups: int, scaling: float) -> Tensor:
    """(T, H, E): per expert the inner product of the gated shrink's gradient with the shrink."""
    _, heads, experts = gates_THE.shape
    shape = (s_TGR.shape[0], groups, experts, s_TGR.shape[1] // (groups * experts))
    products = dgated_TGR.to(gates_THE.dtype) * s_TGR.to(gates_THE.dtype)
    dgates = products.view(shape).sum(-1).mul_(scaling)
    return dgates if heads == groups else dgates.sum(1, keepdim=True)


def _part(columns_TGR: Tensor, g: int, groups: int) -> Tensor:
    return columns_TGR if groups == 1 else columns_TGR.chunk(groups, dim=1)[g]


def kept_of(x_TK: Tensor, seed: Tensor | None, p: float, stream: int) -> Tensor | None:
    """Dropout's mask of x, if there is dropout."""
    if not p:
        return None
    assert seed is not None
    return dropout_mask(seed, x_TK.shape[0], x_TK.shape[1], p, stream)


def _masked(x_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
    """Zero where dropout drops; in the workspace."""
    return x_TK if kept_TK is None else torch.mul(x_TK, kept_TK, out=workspace.empty(x_TK, *x_TK.shape))


def scaled(a: Tensor, p: float) -> Tensor:
    """A, or its gradient, times what dropout's survivors are multiplied by: that is smaller than x by far."""
    return a * survivor_scale(p) if p else a
