"""Projections with experts for a few tokens, as generation with a KV cache asks for them, one token a forward.

There the time goes into starting operations and into reading weights, so nothing is copied, joined or cast but the
input: the fp32 masters are multiplied as they are, which is also nearer to the definition than copies of them in the
dtype of a 16-bit base. All experts are computed; no sums for router losses, no gradient.

Shape letters: T tokens, K input features, N output features, H routers, E experts, r rank of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from molora.layers import LoraLinear, Router
    from molora.routing import Ledger

MOST_TOKENS = 64
"""Above it the arithmetic counts for more than what is saved here."""

SMALL = 1 << 16
"""Elements of a weight below which starting a product takes longer than the product."""


def serves(x: Tensor, projection: LoraLinear, ledger: Ledger | None) -> bool:
    """Whether ``x`` (..., K), the input of ``projection``, is for this module: few tokens, no wider than the masters,
    no gradient to come, no dropout, nobody who records more of routers than gates, and routers without a selection
    bias."""
    if torch.is_grad_enabled() or x.numel() > MOST_TOKENS * x.shape[-1]:
        return False
    if ledger is not None and (ledger.selection_bias or not (ledger.current is None or ledger.current.gates_only)):
        return False
    masters = projection.lora_a.dtype
    if x.dtype != masters and torch.promote_types(x.dtype, masters) != masters:
        return False
    dropout = projection.training and projection.dropout > 0
    return not (dropout or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type))


def few_tokens(
    x: Tensor, projections: Sequence[LoraLinear], routers: Sequence[Router], top_k: int, gates: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Outputs (..., N) of projections that read ``x`` (..., K), and the gates (H, T, E) that weighed their experts:
    those of ``routers``, or if there are none the ``gates`` given."""
    x_TK = x.reshape(-1, x.shape[-1]).to(projections[0].lora_a.dtype)
    if routers:
        gates = _route(x_TK, routers, top_k)
    gates_TE1 = [] if gates is None else gates.unsqueeze(-1).unbind()
    outputs = []
    for i, projection in enumerate(projections):
        s = _product(x_TK, projection.lora_a)
        if gates_TE1:
            g = gates_TE1[i % len(gates_TE1)]  # the one router's, or each its own
            s = (s.view(*g.shape[:2], -1) * g).reshape(s.shape)
        added = _product(s, projection.lora_b)
        y = projection.base(x)
        outputs.append(y.add_(added.view(y.shape), alpha=projection.scaling))
    return outputs, gates


def _product(x_TK: Tensor, weight: Tensor) -> Tensor:
    """``x W^T``. A large weight comes first, the rows of x its columns, two or more: with few rows and with one column
    this takes two to three times as long on a CPU (MKL, 2 threads)."""
    if weight.numel() < SMALL or x_TK.device.type != "cpu":
        return F.linear(x_TK, weight)
    if x_TK.shape[0] == 1:
        return torch.mm(weight, x_TK.expand(2, -1).contiguous().T)[:, 0].unsqueeze(0)
    return torch.mm(weight, x_TK.contiguous().T).T


def _route(x_TK: Tensor, routers: Sequence[Router], top_k: int) -> Tensor:
    logits = torch.stack([F.linear(x_TK, router.weight, router.bias) for router in routers])
    # Stable, so that of equal logits the first expert is chosen, as everywhere.
    best, chosen = logits.sort(dim=-1, descending=True, stable=True)
    best, chosen = best[..., :top_k], chosen[..., :top_k]
    of_chosen = logits.softmax(-1).gather(-1, chosen) if top_k == 1 else best.softmax(-1)
    return torch.zeros_like(logits).scatter_(-1, chosen, of_chosen)
