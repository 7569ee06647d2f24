"""Projections with experts for a few tokens, as generation with a KV cache asks for them, one token a forward.

There the time goes into starting operations and into reading weights. So what :mod:`molora_kernels` does anew at each
call is kept here from token to token: the adapters in the dtype of the base, scaled and beside each other, and the
routers of one input as one matrix. No sums for router losses, no gradient. The kept copies are made again when a
parameter has changed (its address or its version: a change in place through ``.data`` has neither), and dropped when
the layer computes anything but a few tokens. Nothing is kept while a parameter has a gradient: a fused optimizer, which
may step at any time then, does not count versions up.

Shape letters: T tokens, G projections of one input, H routers, E experts, r rank of one expert.
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

MOST_TOKENS = 16
"""Above it the arithmetic counts for more than what is saved here."""


def serves(x: Tensor, projection: LoraLinear, ledger: Ledger | None) -> bool:
    """Whether ``x`` (..., K), the input of ``projection``, is for this module: few tokens, no gradient to come, no
    dropout, nobody who records what routers do, and routers without a selection bias."""
    if torch.is_grad_enabled() or x.numel() > MOST_TOKENS * x.shape[-1]:
        return False
    if ledger is not None and (ledger.current is not None or ledger.selection_bias):
        return False
    dropout = projection.training and projection.dropout > 0
    return not (dropout or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type))


class Kept:
    """Copies of the parameters of projections that read one input, and of their routers: one for each, one for all, or
    none."""

    def __init__(self) -> None:
        self._made_from: object = None

    def __call__(
        self,
        x: Tensor,
        projections: Sequence[LoraLinear],
        routers: Sequence[Router],
        top_k: int,
        gates: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Outputs (..., N) of each projection, and the gates (T, H, E) that weighed the experts: those of ``routers``,
        or if there are none the ``gates`` given."""
        sources = [t for p in projections for t in (p.lora_a, p.lora_b)]
        sources += [t for r in routers for t in (r.weight, r.bias)]
        made_from = (x.dtype, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in sources))
        in_training = any(t.grad is not None for t in sources)
        if in_training or made_from != self._made_from:
            self._make(x.dtype, projections, routers)
            self._made_from = None if in_training else made_from
        x_TK = x.reshape(-1, x.shape[-1])
        if routers:
            gates = self._route(x_TK, len(routers), top_k)
        s = F.linear(x_TK, self._a)
        if gates is not None:
            s = s.view(len(s), len(projections), gates.shape[-1], -1)
            s = (s * gates.to(s.dtype).unsqueeze(-1)).view(len(s), -1)
        outputs = [
            torch.addmm(projection.base(x_TK), part, b).view(*x.shape[:-1], -1)
            for projection, part, b in zip(projections, s.chunk(len(projections), dim=-1), self._b, strict=True)
        ]
        return outputs, gates

    def _make(self, dtype: torch.dtype, projections: Sequence[LoraLinear], routers: Sequence[Router]) -> None:
        self._a = torch.cat([p.lora_a for p in projections]).to(dtype)  # (G E r, K)
        self._b = [(p.lora_b * p.scaling).to(dtype).T.contiguous() for p in projections]  # (E r, N)
        if routers:
            wide = torch.promote_types(dtype, torch.float32)
            self._router_weight = torch.cat([r.weight for r in routers]).to(wide)  # (H E, K)
            self._router_bias = torch.cat([r.bias for r in routers]).to(wide)

    def _route(self, x_TK: Tensor, heads: int, top_k: int) -> Tensor:
        logits = F.linear(x_TK.to(self._router_weight.dtype), self._router_weight, self._router_bias)
        logits = logits.view(len(x_TK), heads, -1)
        # Stable, so that of equal logits the first expert is chosen, as everywhere.
        best, chosen = logits.sort(dim=-1, descending=True, stable=True)
        best, chosen = best[..., :top_k], chosen[..., :top_k]
        of_chosen = logits.softmax(-1).gather(-1, chosen) if top_k == 1 else best.softmax(-1)
        return torch.zeros_like(logits).scatter_(-1, chosen, of_chosen)
