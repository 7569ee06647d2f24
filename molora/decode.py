"""When the experts of a few tokens are computed on their own, as generation with a KV cache asks for them, one token a
forward: :func:`molora_kernels.few_tokens`. There the time goes into starting operations and into reading weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from molora.layers import LoraLinear
    from molora.routing import Ledger

MOST_TOKENS = 64
"""Above it the arithmetic counts for more than what is saved here."""


def serves(x: Tensor, projection: LoraLinear, ledger: Ledger | None) -> bool:
    """Whether ``x`` (..., K), the input of ``projection``, goes that way: few tokens, no wider than the masters,
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
