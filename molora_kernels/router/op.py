"""The router as PyTorch operators: schemas, fakes and the autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molora_kernels import autocast
from molora_kernels.backend import backend_for
from molora_kernels.direct import Operator, is_plain
from molora_kernels.router import portable


def _router_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selection_bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gates, logits, sums, counts)"""
    if backend_for(x.device) == "triton":
        from molora_kernels.router import forward

        return forward.forward(x, weight, bias, selection_bias, mask, top_k)
    weights, biases, selection = ([] if t is None else list(t.unbind(0)) for t in (weight, bias, selection_bias))
    return portable.forward(x, weights, biases, selection, mask, top_k)


router_fwd = torch.library.custom_op("molora::router_fwd", _router_fwd, mutates_args=())


@router_fwd.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, selection_bias: Tensor | None, mask: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, experts, _ = weight.shape
    dtype = torch.promote_types(torch.float32, x.dtype)
    gates = x.new_empty(x.shape[0], heads, experts, dtype=dtype)
    sums = x.new_empty(heads, 1 + experts, dtype=dtype)
    return gates, torch.empty_like(gates), sums, x.new_empty(heads, experts, dtype=dtype)


def _router_bwd(
    dgates: Tensor | None,
    dsums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    top_k: int,
    need_dx: bool,
    need_drouter: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); what is not needed is empty"""
    args = (dgates, dsums, x, weight, logits, gates, mask, top_k, need_dx, need_drouter)
    if backend_for(x.device) == "triton":
        from molora_kernels.router import backward

        return backward.backward(*args)
    with autocast.off(x):  # backward may be called under autocast, though it should not be
        return portable.backward(*args)


router_bwd = torch.library.custom_op("molora::router_bwd", _router_bwd, mutates_args=())


@router_bwd.register_fake
def _(
    dgates: Tensor | None,
    dsums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    top_k: int,
    need_dx: bool,
    need_drouter: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_dx else 0),
        logits.new_empty(weight.shape if need_drouter else 0),
        logits.new_empty(weight.shape[:2] if need_drouter else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, mask, ctx.top_k = inputs
    gates, logits, _, _ = output
    ctx.save_for_backward(x, weight, bias, mask, logits, gates)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dgates: Tensor | None, _dlogits: None, dsums: Tensor | None, _dcounts: None) -> tuple[Any, ...]:
    x, weight, bias, mask, logits, gates = ctx.saved_tensors
    if dgates is None and dsums is None:
        return (None,) * 6
    need_dx, need_drouter = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    compute: Any = _router_bwd if is_plain(x) else router_bwd
    dx, dweight, dbias = compute(dgates, dsums, x, weight, logits, gates, mask, ctx.top_k, need_dx, need_drouter)
    return (
        dx if need_dx else None,
        dweight.to(weight.dtype) if need_drouter else None,
        dbias.to(bias.dtype) if need_drouter and bias is not None else None,
        None,
        None,
        None,
    )


router_fwd.register_autograd(_backward, setup_context=_setup_context)
router = Operator(router_fwd, _router_fwd, _setup_context, _backward)
