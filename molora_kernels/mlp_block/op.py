"""The SwiGLU block with routed experts as PyTorch operators: schemas, fakes and the autograd formula.

Dense, y is an operator of its own, ``mlp_block_down``, that saves nothing and hands its gradient on as it is; all of
backward is the first operator's. So activation checkpointing, which stops recomputing when it has what was saved, does
not compute y again, as it does not for a frozen block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molora_kernels import autocast
from molora_kernels.backend import backend_for
from molora_kernels.direct import Operator, is_plain
from molora_kernels.mlp_block import portable


def _mlp_block_fwd(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    router_weights: list[Tensor],
    router_biases: list[Tensor],
    selection_biases: list[Tensor],
    mask: Tensor | None,
    dropout_seed: Tensor | None,
    top_k: int,
    scaling: float,
    dropout_p: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """(y, sums, counts, what backward needs, nothing); dense, a stand-in for y with its gradient, and last h"""
    args = (x, weights, biases, lora_a, lora_b, router_weights, router_biases, selection_biases, mask, dropout_seed)
    if backend_for(x.device) == "triton":
        from molora_kernels.mlp_block import forward

        found, sums, counts, saved = forward.forward(*args, top_k, scaling, dropout_p, form)
    else:
        found, sums, counts, saved = portable.forward(*args, top_k, scaling, dropout_p, form)
    y, h = (_stand_in(x, weights), found) if form == "dense" else (found, x.new_empty(0))
    return y, sums, counts, saved, h


def _stand_in(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Of y's shape and one element's memory; zero, since who compares operators' outputs (opcheck) compares this."""
    return x.new_zeros(1).expand(x.shape[0], weights[2].shape[0])


mlp_block_fwd = torch.library.custom_op("molora::mlp_block_fwd", _mlp_block_fwd, mutates_args=())


@mlp_block_fwd.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    router_weights: list[Tensor],
    router_biases: list[Tensor],
    selection_biases: list[Tensor],
    mask: Tensor | None,
    dropout_seed: Tensor | None,
    top_k: int,
    scaling: float,
    dropout_p: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    tokens, heads = x.shape[0], len(router_weights)
    dtype = torch.promote_types(torch.float32, x.dtype)
    if form == "dense":
        y, h = _stand_in(x, weights), x.new_empty(tokens, weights[0].shape[0])
    else:
        y, h = x.new_empty(tokens, weights[2].shape[0]), x.new_empty(0)
    pre = [x.new_empty(tokens, weights[i].shape[0]) for i in (0, 1)]
    ranks = [a.shape[0] if form == "dense" else a.shape[0] // router_weights[0].shape[0] * top_k for a in lora_a]
    shrunk = [x.new_empty(tokens, 2 * ranks[0]), x.new_empty(tokens, ranks[2])]
    if not heads:
        sums, counts = portable.no_routing(x)
        return y, sums, counts, [*pre, *shrunk, *(x.new_empty(0) for _ in range(4))], h
    experts = router_weights[0].shape[0]

    def routed(h: int) -> list[Tensor]:
        return [x.new_empty(tokens, h, experts, dtype=dtype) if h else x.new_empty(0) for _ in range(2)]

    sums = x.new_empty(heads, 1 + experts, dtype=dtype)
    return (
        y,
        sums,
        x.new_empty(heads, experts, dtype=dtype),
        [*pre, *shrunk, *routed(min(heads, 2)), *routed(heads // 3)],
        h,
    )


def gates_of(saved: list[Tensor]) -> list[Tensor]:
    """Of what the forward saved, the gates (T, H, E) of gate and up, and of down; none without routers."""
    return [gates for gates in (saved[4], saved[6]) if gates.ndim == 3]


def of_down(saved: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Likewise the shrink of down and the gates that it has, its own or those that gate and up have too."""
    gates = gates_of(saved)
    return saved[3], gates[-1] if gates else None


def _mlp_block_bwd(
    dy: Tensor,
    dsums: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    router_weights: list[Tensor],
    saved: list[Tensor],
    mask: Tensor | None,
    dropout_seed: Tensor | None,
    top_k: int,
    scaling: float,
    dropout_p: float,
    form: str,
    need_dx: bool,
    need_dlora: bool,
    need_drouter: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(dx, da, db, drouter_weights, drouter_biases); what is not needed is empty"""
    args = (dy, dsums, x, weights, lora_a, lora_b, router_weights, saved, mask, dropout_seed, top_k, scaling, dropout_p)
    needs = (need_dx, need_dlora, need_drouter)
    with autocast.off(x):  # backward may be called under autocast, though it should not be
        if backend_for(x.device) == "triton":
            from molora_kernels.mlp_block import backward

            return backward.backward(*args, *needs, form)
        return portable.backward(*args, *needs, form)


mlp_block_bwd = torch.library.custom_op("molora::mlp_block_bwd", _mlp_block_bwd, mutates_args=())


@mlp_block_bwd.register_fake
def _(
    dy: Tensor,
    dsums: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    router_weights: list[Tensor],
    saved: list[Tensor],
    mask: Tensor | None,
    dropout_seed: Tensor | None,
    top_k: int,
    scaling: float,
    dropout_p: float,
    form: str,
    need_dx: bool,
    need_dlora: bool,
    need_drouter: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    dtype = torch.promote_types(torch.float32, x.dtype)
    routers = router_weights if need_drouter else []
    return (
        x.new_empty(x.shape) if need_dx else x.new_empty(0),
        [a.new_empty(a.shape) for a in lora_a] if need_dlora else [],
        [b.new_empty(b.shape) for b in lora_b] if need_dlora else [],
        [w.new_empty(w.shape, dtype=dtype) for w in routers],
        [w.new_empty(w.shape[0], dtype=dtype) for w in routers],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    (x, weights, biases, lora_a, lora_b, router_weights, router_biases, selection_biases, mask, dropout_seed,
     *ctx.settings) = inputs  # fmt: skip
    *_, saved, _ = output
    ctx.counts = len(biases), len(router_weights), len(router_biases), len(selection_biases)
    ctx.save_for_backward(x, *weights, *lora_a, *lora_b, *router_weights, mask, dropout_seed, *saved)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, dsums: Tensor | None, _dcounts: None, _dsaved: list[None], _dh: None
) -> tuple[Any, ...]:
    biases, routers, router_biases, selection_biases = ctx.counts
    x, *rest = ctx.saved_tensors
    weights, lora_a, lora_b, rest = rest[:3], rest[3:6], rest[6:9], rest[9:]
    router_weights, (mask, dropout_seed, *saved) = rest[:routers], rest[routers:]
    needs = ctx.needs_input_grad
    need_dx, need_dlora, need_drouter = needs[0], any(needs[3]) or any(needs[4]), any(needs[5]) or any(needs[6])
    if dy is None:
        dy = x.new_zeros(x.shape[0], weights[2].shape[0])
    compute: Any = _mlp_block_bwd if is_plain(x) else mlp_block_bwd
    dx, da, db, drouter, drouter_bias = compute(
        dy, dsums, x, weights, lora_a, lora_b, router_weights, saved, mask, dropout_seed,
        *ctx.settings, need_dx, need_dlora, need_drouter,
    )  # fmt: skip
    return (
        dx if need_dx else None,
        [None] * 3,
        [None] * biases,
        da if need_dlora else [None] * 3,
        db if need_dlora else [None] * 3,
        [d.to(w.dtype) for d, w in zip(drouter, router_weights, strict=True)] if need_drouter else [None] * routers,
        drouter_bias if need_drouter and router_biases else [None] * router_biases,
        [None] * selection_biases,
        None,
        None,
        *(None for _ in ctx.settings),
    )


mlp_block_fwd.register_autograd(_backward, setup_context=_setup_context)
mlp_block = Operator(mlp_block_fwd, _mlp_block_fwd, _setup_context, _backward)


def _mlp_block_down(
    stand_in: Tensor,
    h: Tensor,
    s: Tensor,
    gates: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_b: Tensor,
    scaling: float,
) -> Tensor:
    """y = h W^T + b + scaling * (gates * s) B^T, whose gradient is the stand-in's"""
    args = (h, s, gates, weight, bias, lora_b, scaling)
    if backend_for(h.device) == "triton":
        from molora_kernels.mlp_block import forward

        return forward.down(*args)
    return portable.down(*args)


mlp_block_down = torch.library.custom_op("molora::mlp_block_down", _mlp_block_down, mutates_args=())


@mlp_block_down.register_fake
def _(
    stand_in: Tensor,
    h: Tensor,
    s: Tensor,
    gates: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_b: Tensor,
    scaling: float,
) -> Tensor:
    return h.new_empty(h.shape[0], weight.shape[0])


def _setup_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)


def _backward_down(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    return dy, *(None,) * 7


mlp_block_down.register_autograd(_backward_down, setup_context=_setup_down)
down = Operator(mlp_block_down, _mlp_block_down, _setup_down, _backward_down)
