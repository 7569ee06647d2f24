"""The public router: checks its input, picks the backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from molora_kernels import autocast
from molora_kernels.backend import reference_chosen, require_one_device
from molora_kernels.router import op, reference


class Routing(NamedTuple):
    """What routers decided, and the sums that their losses are made of. Shape letters as in :func:`router`."""

    gates: Tensor
    """(..., H, E) fp32: weight of each expert, zero where not chosen."""
    sums: Tensor
    """(H, 1 + E) fp32: over valid tokens, the sum of squared logsumexp, then the sum of each expert's probability."""
    counts: Tensor
    """(H, E) fp32: valid tokens that chose each expert; carries no gradient."""


def router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    mask: Tensor | None = None,
    selection_bias: Tensor | None = None,
) -> Routing:
    """Softmax router with top-k gates, for H routers that read the same input.

    ``logits = x W^T + b`` and ``p = softmax(logits)`` in fp32; the ``top_k`` largest p (ties: lower index) are
    renormalised to sum 1 and are the gates. For ``top_k = 1`` the gate is p itself: a renormalised single gate is
    constant and would give its router no gradient.

    Losses are formed from the returned sums. With n valid tokens: z-loss ``sums[:, 0] / n`` (ST-MoE,
    arXiv 2202.08906, eq. 5); load balance ``E * sum_e (counts_e / (k n)) * (sums_{1+e} / n)`` (Switch Transformer,
    arXiv 2101.03961, eq. 4, divided by k so that balance is 1 for every k). Sums, unlike means, add up over
    micro-batches and devices.

    Args:
        x: (..., K), any floating dtype.
        weight: (H, E, K), H routers of E experts each; fp32 (fp64 is kept).
        bias: (H, E) or None.
        top_k: experts per token, ``1 <= top_k <= E``.
        mask: (...) bool or 0/1, the leading shape of x; only true tokens count in ``sums`` and ``counts``.
        selection_bias: (H, E) or None; added to p for the choice only (arXiv 2408.15664). No gradient.

    Returns:
        :class:`Routing`; fp32, or fp64 for fp64 x.

    Raises:
        ValueError: shapes or devices that do not fit, or ``top_k`` out of range.
    """
    if weight.ndim != 3 or x.ndim < 1 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"router: x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (..., K) and (H, E, K)"
        )
    heads, experts, features = weight.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"router: top_k={top_k} must lie between 1 and the number of experts, {experts}")
    for name, given in (("bias", bias), ("selection_bias", selection_bias)):
        if given is not None and given.shape != (heads, experts):
            raise ValueError(f"router: {name} is {tuple(given.shape)}; expected (H, E) = {(heads, experts)}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"router: mask is {tuple(mask.shape)}; expected the leading shape of x, {tuple(x.shape[:-1])}")

    require_one_device("router", x, (weight, bias, selection_bias, mask))
    flat = x.reshape(-1, features)
    flat_mask = None if mask is None else mask.reshape(-1)
    with autocast.off(x):
        if reference_chosen():
            gates, sums, counts = reference.router(flat, weight, bias, selection_bias, flat_mask, top_k)
        else:
            gates, _, sums, counts = op.router(flat, weight, bias, selection_bias, flat_mask, top_k)
    return Routing(gates.view(*x.shape[:-1], heads, experts), sums, counts.detach())
