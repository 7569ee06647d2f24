"""Projections with routed LoRA experts as the definition reads: a loop over projections and experts, autograd behind.

Shape letters: T tokens, K input features, N output features, G projections that read the same input, E experts,
r rank of one expert, R = E * r, H gate sets (G, or 1 shared by all projections).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_lora(
    x_TK: Tensor,
    weights_NK: list[Tensor],
    biases_N: list[Tensor],
    lora_a_RK: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    scaling: float,
    kept_TK: Tensor | None,
    keep_scale: float,
) -> list[Tensor]:
    """One (T, N) output per projection; ``kept_TK`` (bool) and ``keep_scale`` are the adapters' dropout."""
    dropped = x_TK if kept_TK is None else torch.where(kept_TK, x_TK * keep_scale, 0)
    outputs = []
    for g, (a, b) in enumerate(zip(lora_a_RK, lora_b_NR, strict=True)):
        y = x_TK.new_zeros(x_TK.shape[0], b.shape[0])
        if weights_NK:
            y = F.linear(x_TK, weights_NK[g], biases_N[g] if biases_N else None)
        experts = 1 if gates_THE is None else gates_THE.shape[-1]
        for e, (a_e, b_e) in enumerate(zip(a.chunk(experts, dim=0), b.chunk(experts, dim=1), strict=True)):
            expert = F.linear(F.linear(dropped, a_e.to(x_TK.dtype)), b_e.to(x_TK.dtype))
            if gates_THE is not None:
                gate = gates_THE[:, g if gates_THE.shape[1] > 1 else 0, e]
                expert = expert * gate[:, None].to(x_TK.dtype)
            y = y + scaling * expert
        outputs.append(y)
    return outputs
