"""``torch.autocast`` around the operators: inputs and base weights follow it, experts and routers do not.

The operators keep fp32 masters and fp32 routing on purpose, so they decide dtypes themselves: what autocast would do to
a linear layer is done to the input and the frozen weights here, and inside it is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def follow(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``x`` and the frozen ``weights`` (or biases) in autocast's dtype where it is on and x is a float it casts."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, list(weights)
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), [weight.to(dtype) for weight in weights]


def off(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast is off on x's device."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
