"""The SwiGLU block with routed experts in plain PyTorch, hand-written backward: what the ``torch`` backend runs.

Backward recomputes ``h = silu(h_gate) * h_up`` instead of saving it, so the block saves its input, the two
pre-activations, the shrinks, gates and logits. That is less than autograd saves for the frozen block alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from molora_kernels import workspace
from molora_kernels.dropout import Dropout
from molora_kernels.grouped_lora import cpp as grouped
from molora_kernels.grouped_lora import portable, portable_grouped
from molora_kernels.mlp_block import cpp
from molora_kernels.one_pass import one_pass
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
    """y, or h in the dense form, for :func:`down`; sums, counts, and what backward needs: [h_gate, h_up, s_in, s_down,
    gates_in, logits_in, gates_down, logits_down], of which gates and logits are empty where there is no such router."""

    def route(x: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return router.forward(x, router_weights[part], router_biases[part], selection_biases[part], mask_T, top_k)

    gates_in = logits_in = gates_down = logits_down = None
    if router_weights:
        gates_in, logits_in, sums, counts = route(x_TK, slice(0, 2))
    else:
        sums, counts = no_routing(x_TK)
    project: Callable[..., tuple[list[Tensor], Tensor]] = portable.forward
    if form == "grouped":
        project = functools.partial(_grouped(x_TK, gates_in).forward, top_k=top_k)
    (h_gate, h_up), s_in = project(
        x_TK, weights[:2], biases[:2], lora_a[:2], lora_b[:2], gates_in, dropout_seed, scaling, dropout_p, 0
    )
    h = (workspace.lasting if form == "dense" else workspace.empty)(h_gate, *h_gate.shape)
    _swiglu(h_gate, h_up, h)
    if len(router_weights) == 3:
        gates_down, logits_down, sums_down, counts_down = route(h, slice(2, 3))
        sums, counts = torch.cat([sums, sums_down]), torch.cat([counts, counts_down])
    if form == "dense":
        found, s_down = h, portable.shrink(h, lora_a[2:], Dropout(dropout_seed, dropout_p, stream=1))
    else:
        (found,), s_down = project(
            h, weights[2:], biases[2:], lora_a[2:], lora_b[2:], gates_in if gates_down is None else gates_down,
            dropout_seed, scaling, dropout_p, 1,
        )  # fmt: skip
    routed = [x_TK.new_empty(0) if t is None else t for t in (gates_in, logits_in, gates_down, logits_down)]
    return found, sums, counts, [h_gate, h_up, s_in, s_down, *routed]


@workspace.scope()
def down(
    h_TI: Tensor,
    s_TR: Tensor,
    gates_THE: Tensor | None,
    weight_KI: Tensor,
    bias_K: Tensor | None,
    lora_b_KR: Tensor,
    scaling: float,
) -> Tensor:
    """y of the dense form."""
    biases = [] if bias_K is None else [bias_K]
    return portable.expand(h_TI, [weight_KI], biases, [lora_b_KR], s_TR, gates_THE, scaling)[0]


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
    h_gate, h_up, s_in, s_down, *routed = saved
    gates_in, logits_in, gates_down, logits_down = (None if t.numel() == 0 and t.ndim == 1 else t for t in routed)
    of_down = gates_in if gates_down is None else gates_down
    # Experts of gate and up train through down's router too, so frozen routers do not spare their logits' gradient.
    need_dlogits = bool(router_weights) and (need_dx or need_drouter or need_dlora)
    needs = need_dlora, need_dlogits
    lora: Any = _grouped(x_TK, gates_in) if form == "grouped" else portable
    sorted_in, sorted_down = (
        {"orders": lora.orders_of(gates, projections, top_k)} if form == "grouped" else {}
        for gates, projections in ((gates_in, 2), (of_down, 1))
    )

    def to_weights(
        x: Tensor, ds: Tensor, dropout: Dropout, lora_a: list[Tensor], dlogits: Tensor | None, orders: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """da, and the routers' gradients: in one product where that is exact enough."""
        dlogits = dlogits if need_drouter else None
        columns = None if dlogits is None or not need_dlora else router.columns_of(dlogits, x.dtype)
        da = [a.new_empty(a.shape) for a in lora_a] if need_dlora else []
        if need_dlora:
            products = lora.to_adapter(x, ds, dropout, da, columns, **orders)
            if columns is not None and dlogits is not None:
                return da, router.dweights_of_columns(products, dlogits)
        return da, [] if dlogits is None else router.dweights_of(dlogits, x)

    dropout = Dropout(dropout_seed, dropout_p, stream=1)
    ds, db_down, dgates_down = lora.to_shrink([dy_TK], lora_b[2:], of_down, s_down, scaling, *needs, **sorted_down)
    dlogits, dbiases_down = None, []
    if need_dlogits and gates_down is not None and logits_down is not None:
        dsums_down = None if dsums is None else dsums[2:]
        dlogits, dbiases_down = router.dlogits_of(
            dgates_down, dsums_down, logits_down, gates_down, mask_T, top_k, need_drouter
        )
    h, dh, dh_up = (workspace.empty(h_gate, *h_gate.shape) for _ in range(3))
    routed_down = () if dlogits is None else (dlogits[:, 0], router_weights[2])
    lora.to_input([dy_TK], weights[2:], lora_a[2:], ds, dropout, dh, *routed_down, **sorted_down)
    _swiglu_backward_(dh, h_gate, h_up, h, dh_up)
    da_down, dweights_down = to_weights(h, ds, dropout, lora_a[2:], dlogits, sorted_down)

    dropout, dh_in = dropout._replace(stream=0), [dh, dh_up]
    ds, db_in, dgates_in = lora.to_shrink(dh_in, lora_b[:2], gates_in, s_in, scaling, *needs, **sorted_in)
    dlogits, dbiases_in = None, []
    if need_dlogits and gates_in is not None and logits_in is not None:
        if gates_down is None:
            dgates_in = dgates_in + dgates_down
        dsums_in = None if dsums is None else dsums[: gates_in.shape[1]]
        dlogits, dbiases_in = router.dlogits_of(dgates_in, dsums_in, logits_in, gates_in, mask_T, top_k, need_drouter)
    dx = x_TK.new_empty(0)
    if need_dx:
        dx = workspace.lasting(x_TK, *x_TK.shape)
        routed_in = () if dlogits is None else (dlogits.flatten(1), torch.cat(router_weights[:2]))
        lora.to_input(dh_in, weights[:2], lora_a[:2], ds, dropout, dx, *routed_in, **sorted_in)
    da_in, dweights_in = to_weights(x_TK, ds, dropout, lora_a[:2], dlogits, sorted_in)
    da, db = [*da_in, *da_down], [*db_in, *db_down]
    return dx, da, db, [*dweights_in, *dweights_down], [*dbiases_in, *dbiases_down]


def _grouped(x: Tensor, gates: Tensor | None) -> Any:
    """The module that computes the grouped form of rows like x."""
    return grouped if grouped.serves(x, gates) else portable_grouped


def _swiglu(h_gate: Tensor, h_up: Tensor, out: Tensor) -> None:
    (cpp.swiglu if cpp.serves(h_gate, h_up, out) else _swiglu_pass)(h_gate, h_up, out)


def _swiglu_backward_(dh: Tensor, h_gate: Tensor, h_up: Tensor, h: Tensor, dh_up: Tensor) -> None:
    """h again, dh_up, and dh_gate in the place of dh."""
    own = cpp.swiglu_backward_ if cpp.serves(dh, h_gate, h_up, h, dh_up) else _swiglu_backward_pass_
    own(dh, h_gate, h_up, h, dh_up)


@one_pass(rows=3)
def _swiglu_pass(h_gate: Tensor, h_up: Tensor, out: Tensor) -> None:
    torch.mul(F.silu(h_gate), h_up, out=out)


@one_pass(rows=5)
def _swiglu_backward_pass_(dh: Tensor, h_gate: Tensor, h_up: Tensor, h: Tensor, dh_up: Tensor) -> None:
    silu = F.silu(h_gate)
    torch.mul(silu, h_up, out=h)
    torch.mul(silu, dh, out=dh_up)
    dh.copy_(torch.ops.aten.silu_backward(dh * h_up, h_gate))


def no_routing(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums and counts of zero routers."""
    return x.new_zeros(0, 2, dtype=torch.float32), x.new_zeros(0, 1, dtype=torch.float32)
