"""Experts of a few tokens in plain PyTorch: the definition, and what all backends but ``inductor`` run.

Nothing is copied, joined or cast but the input: the fp32 masters are multiplied as they are, which is also nearer to
the definition than copies of them in the dtype of a 16-bit base. All experts are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = 1 << 16
"""Elements of a weight below which starting a product takes longer than the product."""


def few_tokens(
    x_TK: Tensor,
    outputs_TN: Sequence[Tensor],
    lora_a_RK: Sequence[Tensor],
    lora_b_NR: Sequence[Tensor],
    scaling: float,
    router_weights_EK: Sequence[Tensor],
    router_biases_E: Sequence[Tensor],
    top_k: int,
    gates_HTE: Tensor | None,
) -> Tensor | None:
    """Adds to the outputs; returns the gates."""
    x_TK = x_TK.to(lora_a_RK[0].dtype)
    if router_weights_EK:
        gates_HTE = _route(x_TK, router_weights_EK, router_biases_E, top_k)
    elif gates_HTE is not None:
        gates_HTE = gates_HTE.to(x_TK.dtype)
    gates_TE1 = [] if gates_HTE is None else gates_HTE.unsqueeze(-1).unbind()
    for i, (y, a_RK, b_NR) in enumerate(zip(outputs_TN, lora_a_RK, lora_b_NR, strict=True)):
        s = _product(x_TK, a_RK)
        if gates_TE1:
            g = gates_TE1[i % len(gates_TE1)]  # the one that all share, or each its own
            s = (s.unflatten(1, (g.shape[1], -1)) * g).flatten(1)
        y.add_(_product(s, b_NR), alpha=scaling)
    return gates_HTE


def _product(x_TK: Tensor, weight: Tensor) -> Tensor:
    """``x W^T``. A large weight comes first, the rows of x its columns, two or more: with few rows and with one column
    this takes two to three times as long on a CPU (MKL, 2 threads)."""
    if weight.numel() < SMALL or x_TK.device.type != "cpu":
        return F.linear(x_TK, weight)
    if x_TK.shape[0] == 1:
        return torch.mm(weight, x_TK.expand(2, -1).contiguous().T)[:, 0].unsqueeze(0)
    return torch.mm(weight, x_TK.contiguous().T).T


def _route(x_TK: Tensor, weights_EK: Sequence[Tensor], biases_E: Sequence[Tensor], top_k: int) -> Tensor:
    logits = torch.stack([F.linear(x_TK, w, b) for w, b in zip(weights_EK, biases_E, strict=True)])
    # Stable, so that of equal logits the first expert is chosen, as everywhere.
    best, chosen = logits.sort(dim=-1, descending=True, stable=True)
    best, chosen = best[..., :top_k], chosen[..., :top_k]
    of_chosen = logits.softmax(-1).gather(-1, chosen) if top_k == 1 else best.softmax(-1)
    return torch.zeros_like(logits).scatter_(-1, chosen, of_chosen)
