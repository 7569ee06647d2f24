"""The router as its definition reads. Any dtype up to fp64, any device, differentiated by autograd.

Shape letters: T tokens, K input features, H routers that read the same input, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def router(
    x_TK: Tensor,
    weight_HEK: Tensor,
    bias_HE: Tensor | None,
    selection_bias_HE: Tensor | None,
    mask_T: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (T, H, E), sums (H, 1 + E) and counts (H, E); see :func:`molora_kernels.router` for what they are."""
    experts = weight_HEK.shape[1]
    dtype = torch.promote_types(torch.float32, x_TK.dtype)
    logits = torch.einsum("tk,hek->the", x_TK.to(dtype), weight_HEK.to(dtype))
    if bias_HE is not None:
        logits = logits + bias_HE.to(dtype)
    probs = torch.softmax(logits, dim=-1)

    # Probabilities order as logits do, but rounding can tie them; without a bias the logits decide.
    scores = logits if selection_bias_HE is None else probs + selection_bias_HE.to(dtype)
    order = torch.sort(scores.detach(), dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(probs).scatter_(-1, order[..., :top_k], 1.0)
    # Renormalised, the chosen probabilities are the softmax over the chosen logits, which cannot become 0 / 0.
    gates = probs * chosen if top_k == 1 else torch.softmax(logits.masked_fill(chosen == 0, float("-inf")), dim=-1)

    valid = torch.ones_like(probs[:, 0, 0]) if mask_T is None else mask_T.to(dtype)
    squared_lse = torch.logsumexp(logits, dim=-1).square()
    z_sum = torch.einsum("t,th->h", valid, squared_lse)
    prob_sums = torch.einsum("t,the->he", valid, probs)
    counts = torch.einsum("t,the->he", valid, chosen)
    assert gates.shape[-1] == experts
    return gates, torch.cat([z_sum[:, None], prob_sums], dim=1), counts
