"""The public projections with routed LoRA experts: checks its input, picks the backend."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from molora_kernels import autocast
from molora_kernels.backend import reference_chosen, require_one_device
from molora_kernels.dropout import check_dropout, dropout_mask, survivor_scale
from molora_kernels.grouped_lora import dispatch, op, reference


def grouped_lora(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *,
    scaling: float,
    gates: Tensor | None = None,
    top_k: int | None = None,
    biases: Sequence[Tensor] = (),
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, ...]:
    """Frozen projections of one input, each with E LoRA experts weighted by gates.

    ``y_g = x W_g^T + b_g + scaling * sum_e gate_{g,e} * dropout(x) A_{g,e}^T B_{g,e}^T`` for the G projections that
    read x (gate/up, or q/k/v). Without gates it is a plain LoRA (arXiv 2106.09685) per projection.

    Args:
        x: (..., K), fp16, bf16, fp32 or fp64.
        weights: G frozen (N_g, K) in x's dtype, or none for what the adapters add alone, beside a base that is computed
            elsewhere (a quantised one). Under ``torch.autocast`` x and they are cast as a linear's would be.
        lora_a: G of (E * r, K); expert e owns rows ``e*r : (e+1)*r``. Any float dtype: fp32 masters are cast to x's
            dtype for the matmuls, and their gradients come back in their own.
        lora_b: G of (N_g, E * r), likewise by columns.
        scaling: ``alpha / r``.
        gates: (..., H, E) with H = G, or H = 1 to share; None for a plain LoRA. Zero where an expert is not chosen. Any
            float dtype; the products with them are fp32 (fp64 for fp64 x).
        top_k: experts chosen per token, where the caller knows: at most so many gates of a token are not zero. Allows
            the grouped form, see :class:`molora_kernels.use_form`, which gives gates that are not chosen no gradient
            (a router's softmax multiplies it by the gate, which is zero).
        biases: none, or G of (N_g,).
        dropout_p: probability of dropping an element of the adapters' input; 0 turns dropout off.
        dropout_seed: () int64 on x's device, needed when ``dropout_p > 0``; see :func:`molora_kernels.dropout_mask`.
        stream: which of the masks under that seed, where a caller needs several.

    Returns:
        G tensors (..., N_g) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit; a base weight or bias that requires grad; dropout
            without a seed.
    """
    features = x.shape[-1]
    x, frozen = autocast.follow(x, [*weights, *biases])
    weights, biases = frozen[: len(weights)], frozen[len(weights) :]
    _check(x, weights, lora_a, lora_b, gates, top_k, biases, dropout_p, dropout_seed)
    flat = x.reshape(-1, features)
    flat_gates = None if gates is None else gates.reshape(-1, *gates.shape[-2:])
    with autocast.off(x):
        if reference_chosen():
            kept = None
            if dropout_p and dropout_seed is not None:
                kept = dropout_mask(dropout_seed, flat.shape[0], features, dropout_p, stream)
            lists = (weights, biases, list(lora_a), list(lora_b))
            outputs = reference.grouped_lora(flat, *lists, flat_gates, scaling, kept, survivor_scale(dropout_p))
        else:
            if flat_gates is not None:
                flat_gates = flat_gates.to(torch.promote_types(torch.float32, x.dtype))
            # the operators give the gradients of all A in one dtype: the widest, so that none is rounded to another's
            widest = functools.reduce(torch.promote_types, [a.dtype for a in lora_a])
            lists = (weights, biases, [a.to(widest) for a in lora_a], list(lora_b))
            experts = 1 if gates is None else gates.shape[-1]
            form = dispatch.form_for(flat, experts, top_k, lora_a[0].shape[0] // experts) if weights else "dense"
            outputs, _ = op.grouped_lora(
                flat, *lists, flat_gates, dropout_seed, scaling, dropout_p, stream, top_k or experts, form
            )
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    gates: Tensor | None,
    top_k: int | None,
    biases: Sequence[Tensor],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> None:
    groups, features = len(lora_a), x.shape[-1]
    if not groups or len(lora_b) != groups or len(weights) not in (0, groups) or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"grouped_lora: {len(weights)} weights, {groups} lora_a, {len(lora_b)} lora_b, {len(biases)} biases; "
            "expected as many of each as there are projections (weights, biases: or none; biases only with weights)"
        )
    rank = lora_a[0].shape[0]
    for g, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        if (
            a.shape != (rank, features)
            or b.shape[1:] != (rank,)
            or (weights and weights[g].shape != (len(b), features))
        ):
            weight = f"weight {tuple(weights[g].shape)}, " if weights else ""
            raise ValueError(
                f"grouped_lora: projection {g} has {weight}A {tuple(a.shape)}, B {tuple(b.shape)} for x "
                f"{tuple(x.shape)}; expected (N, {features}), ({rank}, {features}), (N, {rank})"
            )
    for g, weight in enumerate(weights):
        if weight.dtype != x.dtype:
            raise ValueError(f"grouped_lora: x is {x.dtype} but weight {g} is {weight.dtype}")
        if weight.requires_grad or (biases and biases[g].requires_grad):
            raise ValueError(f"grouped_lora: weight or bias {g} requires grad; base weights are frozen here")
    for g, bias in enumerate(biases):
        if bias.shape != lora_b[g].shape[:1] or bias.dtype != x.dtype:
            raise ValueError(
                f"grouped_lora: bias {g} is {tuple(bias.shape)} {bias.dtype}; expected ({len(lora_b[g])},) {x.dtype}"
            )
    if gates is not None:
        leading, heads, experts = gates.shape[:-2], gates.shape[-2], gates.shape[-1]
        if leading != x.shape[:-1] or heads not in (1, groups) or rank % experts:
            raise ValueError(
                f"grouped_lora: gates are {tuple(gates.shape)} for x {tuple(x.shape)}, {groups} projections and total "
                f"rank {rank}; expected (..., 1 or {groups}, E) with E dividing the rank"
            )
        if top_k is not None and not 1 <= top_k <= experts:
            raise ValueError(f"grouped_lora: top_k={top_k} must lie between 1 and the number of experts, {experts}")
    check_dropout("grouped_lora", dropout_p, dropout_seed)
    require_one_device("grouped_lora", x, (*weights, *biases, *lora_a, *lora_b, gates, dropout_seed))
