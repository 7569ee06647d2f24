"""The SwiGLU block with routed experts in plain PyTorch, hand-written backward: what the ``torch`` backend runs.

Backward recomputes ``h = silu(h_gate) * h_up`` instead of saving it, so the block saves its input, the two
pre-activations, the shrinks, gates and logits. That is less than autograd saves for the frozen block alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from molora_kernels import workspace
from molora_kernels.grouped_lora import portable, portable_grouped
from molora_kernels.grouped_lora.order import sorted_by_set
from molora_kernels.mlp_block import portable_grouped as by_set
from molora_kernels.router import portable as router


@workspace.scope()
def forward(
    x_TK: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    router_weights: list[Tensor],
    router_biases: list[Tensor],
    selection_biases: list[Tensor],
    mask_T: Tensor | None,
    dropout_seed: Tensor | None,
    top_k: int,
    scaling: float,
    dropout_p: float,
    form: str = "dense",
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """y, sums, counts, and what backward needs: [h_gate, h_up, s_in, s_down, gates_in, logits_in, gates_down,
    logits_down], of which the gates and logits are empty where there is no such router."""
    if form == "grouped" and sorted_by_set(router_weights[0].shape[0], top_k):
        return by_set.forward(
            x_TK, weights, biases, lora_a, lora_b, router_weights, router_biases, selection_biases, mask_T,
            dropout_seed, top_k, scaling, dropout_p,
        )  # fmt: skip

    def route(x: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bias = torch.stack(router_biases[part]) if router_biases else None
        selection = torch.stack(selection_biases[part]) if selection_biases else None
        return router.forward(x, torch.stack(router_weights[part]), bias, selection, mask_T, top_k)

    project = functools.partial(portable_grouped.forward, top_k=top_k) if form == "grouped" else portable.forward
    gates_in = logits_in = gates_down = logits_down = None
    sums, counts = no_routing(x_TK)
    if router_weights:
        gates_in, logits_in, sums, counts = route(x_TK, slice(0, 2))
    (h_gate, h_up), s_in = project(
        x_TK, weights[:2], biases[:2], lora_a[:2], lora_b[:2], gates_in, dropout_seed, scaling, dropout_p, 0
    )
    h = _swiglu(h_gate, h_up)
    if len(router_weights) == 3:
        gates_down, logits_down, sums_down, counts_down = route(h, slice(2, 3))
        sums, counts = torch.cat([sums, sums_down]), torch.cat([counts, counts_down])
    (y,), s_down = project(
        h, weights[2:], biases[2:], lora_a[2:], lora_b[2:], gates_in if gates_down is None else gates_down,
        dropout_seed, scaling, dropout_p, 1,
    )  # fmt: skip
    routed = [x_TK.new_empty(0) if t is None else t for t in (gates_in, logits_in, gates_down, logits_down)]
    return y, sums, counts, [h_gate, h_up, s_in, s_down, *routed]


@workspace.scope()
def backward(
    dy_TK: Tensor,
    dsums: Tensor | None,
    x_TK: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    router_weights: list[Tensor],
    saved: list[Tensor],
    mask_T: Tensor | None,
    dropout_seed: Tensor | None,
    top_k: int,
    scaling: float,
    dropout_p: float,
    need_dx: bool,
    need_dlora: bool,
    need_drouter: bool,
    form: str = "dense",
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """dx, da, db (3 each), drouter_weights and drouter_biases (one per router); what is not needed is empty."""
    if form == "grouped" and sorted_by_set(router_weights[0].shape[0], top_k):
        return by_set.backward(
            dy_TK, dsums, x_TK, weights, lora_a, lora_b, router_weights, saved, mask_T, dropout_seed, top_k, scaling,
            dropout_p, need_dx, need_dlora, need_drouter,
        )  # fmt: skip
    h_gate, h_up, s_in, s_down, *routed = saved
    gates_in, logits_in, gates_down, logits_down = (None if t.numel() == 0 and t.ndim == 1 else t for t in routed)
    dtype = x_TK.dtype
    # Experts of gate and up train through down's router too, so frozen routers do not spare their logits' gradient.
    need_dlogits = bool(router_weights) and (need_dx or need_drouter or need_dlora)
    settings = (dropout_seed, scaling, dropout_p)

    project = functools.partial(portable_grouped.backward, top_k=top_k) if form == "grouped" else portable.backward
    h = _swiglu(h_gate, h_up)
    dh, da_down, db_down, dgates_down = project(
        [dy_TK], h, weights[2:], lora_a[2:], lora_b[2:], gates_in if gates_down is None else gates_down, s_down,
        *settings, 1, True, need_dlora, need_dlogits, out=workspace.empty(h, *h.shape),
    )  # fmt: skip
    drouter: list[tuple[Tensor, Tensor]] = []
    if need_dlogits and gates_down is not None and logits_down is not None:
        dsums_down = None if dsums is None else dsums[2:]
        dlogits_down = router.dlogits_of(dgates_down, dsums_down, logits_down, gates_down, mask_T, top_k)
        dh.addmm_(dlogits_down[:, 0].to(dtype), router_weights[2].to(dtype))
        if need_drouter:
            drouter = router.grads_of(dlogits_down, h)

    dh_gate, dh_up = _swiglu_backward_(dh, h, h_gate, h_up)
    dx, da_in, db_in, dgates_in = project(
        [dh_gate, dh_up], x_TK, weights[:2], lora_a[:2], lora_b[:2], gates_in, s_in,
        *settings, 0, need_dx, need_dlora, need_dlogits,
    )  # fmt: skip
    if need_dlogits and gates_in is not None and logits_in is not None:
        if gates_down is None:
            dgates_in = dgates_in + dgates_down
        dsums_in = None if dsums is None else dsums[: gates_in.shape[1]]
        dlogits_in = router.dlogits_of(dgates_in, dsums_in, logits_in, gates_in, mask_T, top_k)
        if need_dx:
            dx.addmm_(dlogits_in.flatten(1).to(dtype), torch.cat(router_weights[:2]).to(dtype))
        if need_drouter:
            drouter = [*router.grads_of(dlogits_in, x_TK), *drouter]

    da = [*(part.clone() for part in da_in.chunk(2)), da_down] if need_dlora else []
    return dx, da, [*db_in, *db_down], [weight for weight, _ in drouter], [bias for _, bias in drouter]


_ROWS = 64
"""Tokens at a time in elementwise passes of several steps: what they read and write stays in a core's cache."""


def _swiglu(h_gate: Tensor, h_up: Tensor) -> Tensor:
    """In the workspace."""
    h = workspace.empty(h_gate, *h_gate.shape)
    return torch.ops.aten.silu.out(h_gate, out=h).mul_(h_up)


def _swiglu_backward_(dh: Tensor, h: Tensor, h_gate: Tensor, h_up: Tensor) -> tuple[Tensor, Tensor]:
    """dh_gate in dh's memory and dh_up in h's."""
    for dh_n, h_n, gate_n, up_n in zip(*(t.split(_ROWS) for t in (dh, h, h_gate, h_up)), strict=True):
        torch.ops.aten.silu.out(gate_n, out=h_n).mul_(dh_n)
        torch.ops.aten.silu_backward.grad_input(dh_n.mul_(up_n), gate_n, grad_input=dh_n)
    return dh, h


def no_routing(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums and counts of zero routers."""
    return x.new_zeros(0, 2, dtype=torch.float32), x.new_zeros(0, 1, dtype=torch.float32)
