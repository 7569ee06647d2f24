"""Projections with routed LoRA experts as PyTorch operators: schemas, fakes and the autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molora_kernels import autocast
from molora_kernels.backend import backend_for
from molora_kernels.direct import Operator, is_plain
from molora_kernels.grouped_lora import cpp, portable, portable_grouped


def _grouped_lora_fwd(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    gates: Tensor | None,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    top_k: int,
    form: str,
) -> tuple[list[Tensor], Tensor]:
    """(one output per projection, the ungated shrink)"""
    args = (x, weights, biases, lora_a, lora_b, gates, dropout_seed, scaling, dropout_p, stream)
    if backend_for(x.device) == "triton":
        from molora_kernels.grouped_lora import forward, grouped

        return forward.forward(*args) if form == "dense" else grouped.forward(*args, top_k)
    if (form == "grouped" or gates is None) and cpp.serves(x, gates):
        return cpp.forward(*args, top_k)
    return portable.forward(*args) if form == "dense" else portable_grouped.forward(*args, top_k)


grouped_lora_fwd = torch.library.custom_op("molora::grouped_lora_fwd", _grouped_lora_fwd, mutates_args=())


@grouped_lora_fwd.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    gates: Tensor | None,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    top_k: int,
    form: str,
) -> tuple[list[Tensor], Tensor]:
    columns = sum(shrink_columns(a.shape[0], gates, top_k, form) for a in lora_a)
    return [x.new_empty(x.shape[0], b.shape[0]) for b in lora_b], x.new_empty(x.shape[0], columns)


def shrink_columns(rank: int, gates: Tensor | None, top_k: int, form: str) -> int:
    """Columns that a projection of total ``rank`` has in the shrink saved for backward: of all experts, or of top_k."""
    return rank if gates is None or form == "dense" else rank // gates.shape[-1] * top_k


def _grouped_lora_bwd(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    gates: Tensor | None,
    s: Tensor,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    top_k: int,
    form: str,
    need_dx: bool,
    need_dlora: bool,
    need_dgates: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """(dx, da of all projections stacked, db, dgates); what is not needed is empty"""
    args = (x, weights, lora_a, lora_b, gates, s, dropout_seed, scaling, dropout_p, stream)
    needs = (need_dx, need_dlora, need_dgates)
    with autocast.off(x):  # backward may be called under autocast, though it should not be
        if backend_for(x.device) == "triton":
            from molora_kernels.grouped_lora import backward, grouped

            if form == "dense":
                return backward.backward(dys, *args, *needs)
            return grouped.backward(dys, *args, *needs, top_k)
        if (form == "grouped" or gates is None) and cpp.serves(x, gates):
            return cpp.backward(dys, *args, *needs, top_k)
        if form == "dense":
            return portable.backward(dys, *args, *needs)
        return portable_grouped.backward(dys, *args, *needs, top_k)


grouped_lora_bwd = torch.library.custom_op("molora::grouped_lora_bwd", _grouped_lora_bwd, mutates_args=())


@grouped_lora_bwd.register_fake
def _(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    gates: Tensor | None,
    s: Tensor,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    top_k: int,
    form: str,
    need_dx: bool,
    need_dlora: bool,
    need_dgates: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    def like(t: Tensor) -> Tensor:
        return t.new_empty(t.shape)

    return (
        like(x) if need_dx else x.new_empty(0),
        lora_a[0].new_empty(sum(a.shape[0] for a in lora_a), x.shape[1]) if need_dlora else x.new_empty(0),
        [like(b) for b in lora_b] if need_dlora else [],
        like(gates) if need_dgates and gates is not None else x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, weights, biases, lora_a, lora_b, gates, dropout_seed, *ctx.settings = inputs
    _, s = output
    ctx.weights, ctx.biases, ctx.groups = len(weights), len(biases), len(lora_b)
    ctx.save_for_backward(x, *weights, *lora_a, *lora_b, gates, dropout_seed, s)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dys: list[Tensor | None], _ds: None) -> tuple[Any, ...]:
    w, n = ctx.weights, ctx.groups
    x, *lists, gates, dropout_seed, s = ctx.saved_tensors
    weights, lora_a, lora_b = lists[:w], lists[w : w + n], lists[w + n :]
    dys = [x.new_zeros(x.shape[0], b.shape[0]) if dy is None else dy for dy, b in zip(dys, lora_b, strict=True)]
    needs = ctx.needs_input_grad
    need_dx, need_dlora, need_dgates = needs[0], any(needs[3]) or any(needs[4]), gates is not None and needs[5]
    compute: Any = _grouped_lora_bwd if is_plain(x) else grouped_lora_bwd
    dx, da, db, dgates = compute(
        dys, x, weights, lora_a, lora_b, gates, s, dropout_seed, *ctx.settings, need_dx, need_dlora, need_dgates
    )  # fmt: skip
    none = [None] * n
    return (
        dx if need_dx else None,
        [None] * w,
        [None] * ctx.biases,
        list(da.chunk(n)) if need_dlora else none,
        db if need_dlora else none,
        dgates if need_dgates else None,
        None,
        *(None for _ in ctx.settings),
    )


grouped_lora_fwd.register_autograd(_backward, setup_context=_setup_context)
grouped_lora = Operator(grouped_lora_fwd, _grouped_lora_fwd, _setup_context, _backward)
