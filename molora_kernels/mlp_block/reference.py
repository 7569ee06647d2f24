"""The SwiGLU block with routed experts on its three projections, composed of the two references."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from molora_kernels.dropout import dropout_mask, survivor_scale
from molora_kernels.grouped_lora.reference import grouped_lora
from molora_kernels.router.reference import router


def mlp_block(
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
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """y (T, K), sums (H, 1 + E), counts (H, E) with H = 0, 1 or 3 routers, and the gates (T, ., E) of those that read
    x and of the one that reads h; see :func:`molora_kernels.mlp_block`."""

    def kept(x: Tensor, stream: int) -> Tensor | None:
        if not dropout_p or dropout_seed is None:
            return None
        return dropout_mask(dropout_seed, x.shape[0], x.shape[1], dropout_p, stream)

    def route(x: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.stack(router_biases[part]) if router_biases else None
        selection = torch.stack(selection_biases[part]) if selection_biases else None
        return router(x, torch.stack(router_weights[part]), bias, selection, mask_T, top_k)

    scale = survivor_scale(dropout_p)
    gates_in = sums = counts = None
    if router_weights:
        gates_in, sums, counts = route(x_TK, slice(0, 2))
    h_gate, h_up = grouped_lora(
        x_TK, weights[:2], biases[:2], lora_a[:2], lora_b[:2], gates_in, scaling, kept(x_TK, 0), scale
    )
    h = F.silu(h_gate) * h_up
    gates_down = gates_in
    if len(router_weights) == 3:
        gates_down, sums_down, counts_down = route(h, slice(2, 3))
        assert sums is not None and counts is not None
        sums, counts = torch.cat([sums, sums_down]), torch.cat([counts, counts_down])
    (y,) = grouped_lora(h, weights[2:], biases[2:], lora_a[2:], lora_b[2:], gates_down, scaling, kept(h, 1), scale)
    if sums is None or counts is None:
        sums, counts = x_TK.new_zeros(0, 2, dtype=torch.float32), x_TK.new_zeros(0, 1, dtype=torch.float32)
    routed = [] if gates_in is None else [gates_in] if gates_down is gates_in else [gates_in, gates_down]
    return y, sums, counts, [gates for gates in routed if gates is not None]
