"""The router in plain PyTorch with a hand-written backward: what the ``torch`` backend runs, and ``inductor`` where
there is no C++ for it (``cpp.py``).

Shape letters: T tokens, K input features, H routers that read the same input, E experts. All router arithmetic is
fp32 (fp64 for fp64 inputs), whatever the dtype of x; but for the weights' gradient from bf16 rows where it rides on the
adapters' (:func:`columns_of`), which is rounded once, as theirs is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora_kernels import workspace
from molora_kernels.router import cpp


def forward(
    x_TK: Tensor,
    weights_EK: list[Tensor],
    biases_E: list[Tensor],
    selection_biases_E: list[Tensor],
    mask_T: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates (T, H, E), logits (T, H, E), sums (H, 1 + E), counts (H, E), of H weights and as many biases or none."""
    if cpp.serves(x_TK):
        return cpp.forward(x_TK, weights_EK, biases_E, selection_biases_E, mask_T, top_k)
    dtype = torch.promote_types(torch.float32, x_TK.dtype)
    with workspace.scope():
        logits = torch.mm(workspace.cast(x_TK, dtype), torch.cat(weights_EK).to(dtype).T)
    logits = logits.view(-1, len(weights_EK), len(weights_EK[0]))
    if biases_E:
        logits += torch.stack(biases_E).to(dtype)
    logits_HET = _experts_first(logits)
    probs = scores = torch.softmax(logits_HET, dim=1)
    if selection_biases_E:
        scores = probs + torch.stack(selection_biases_E).to(dtype)[..., None]
    chosen = _choose(scores if selection_biases_E else logits_HET, top_k)

    # Renormalised, the chosen probabilities are the softmax over the chosen logits, which cannot become 0 / 0.
    gates = probs * chosen if top_k == 1 else torch.softmax(logits_HET.masked_fill(chosen == 0, float("-inf")), dim=1)

    terms = torch.cat([torch.logsumexp(logits_HET, dim=1, keepdim=True).square_(), probs], dim=1)
    if mask_T is not None:
        # select, do not multiply: a padding token may hold anything, and NaN * 0 is NaN
        valid = mask_T.bool()
        terms, chosen = terms.where(valid, 0.0), chosen.where(valid, 0.0)
    return _tokens_first(gates), logits, terms.sum(-1), chosen.sum(-1)


def _experts_first(given_THE: Tensor) -> Tensor:
    """(H, E, T) in memory: softmax and the like over a handful of adjacent numbers cost ten times as much."""
    return given_THE.permute(1, 2, 0).contiguous()


def _tokens_first(given_HET: Tensor) -> Tensor:
    return given_HET.permute(2, 0, 1).contiguous()


def _choose(scores_HET: Tensor, top_k: int) -> Tensor:
    """One where an expert is among the ``top_k`` best, else zero; ties go to the lower index.

    ``torch.topk`` promises no order among ties; ``max`` promises the index of the first maximum.
    """
    chosen = torch.zeros_like(scores_HET)
    left = scores_HET.clone()
    for _ in range(top_k):
        best = left.max(1, keepdim=True).indices
        chosen.scatter_(1, best, 1.0)
        left.scatter_(1, best, float("-inf"))
    return chosen


def backward(
    dgates_THE: Tensor | None,
    dsums_HS: Tensor | None,
    x_TK: Tensor,
    weight_HEK: Tensor,
    logits_THE: Tensor,
    gates_THE: Tensor,
    mask_T: Tensor | None,
    top_k: int,
    need_dx: bool = True,
    need_drouter: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, K) in x's dtype, dweight (H, E, K) and dbias (H, E) in the router's; what is not needed is empty."""
    heads, experts, features = weight_HEK.shape
    dlogits, dbiases = dlogits_of(dgates_THE, dsums_HS, logits_THE, gates_THE, mask_T, top_k, need_drouter)
    flat = dlogits.view(-1, heads * experts)
    dx, dweight, dbias = x_TK.new_empty(0), flat.new_empty(0), flat.new_empty(0)
    if need_dx:
        weight = weight_HEK.reshape(heads * experts, features).to(flat.dtype)
        dx = torch.mm(flat, weight).to(x_TK.dtype)
    if need_drouter:
        with workspace.scope():
            dweight = torch.mm(flat.T, workspace.cast(x_TK, flat.dtype)).view(heads, experts, features)
        dbias = torch.stack(dbiases)
    return dx, dweight, dbias


def dlogits_of(
    dgates_THE: Tensor | None,
    dsums_HS: Tensor | None,
    logits_THE: Tensor,
    gates_THE: Tensor,
    mask_T: Tensor | None,
    top_k: int,
    need_dbias: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(T, H, E): the gradient of the logits from the gates and from the sums that the router losses read; and of each
    router's bias (E,), which is its sum over tokens.

    Renormalised gates are a softmax over the chosen logits, so with h_e = g_e dg_e
    ``dlogit_e = h_e - g_e sum_j h_j``; for k = 1 the gate is p itself and p takes the place of g in the second term.
    Of the sums, z gives ``2 lse p_e``, and the probability sums with upstream w give ``p_e (w_e - sum_j w_j p_j)``.
    """
    if cpp.serves(logits_THE):
        return cpp.dlogits_of(dgates_THE, dsums_HS, logits_THE, gates_THE, mask_T, top_k, need_dbias)
    logits, gates = _experts_first(logits_THE), _experts_first(gates_THE)
    probs = torch.softmax(logits, dim=1)
    if dgates_THE is None:
        dlogits = torch.zeros_like(logits)
    else:
        weighted = gates * _experts_first(dgates_THE)
        share = gates if top_k > 1 else probs
        dlogits = weighted - share * weighted.sum(1, keepdim=True)
    if dsums_HS is not None:
        dz, dprob = dsums_HS[:, :1, None], dsums_HS[:, 1:, None]
        lse = torch.logsumexp(logits, dim=1, keepdim=True)
        from_sums = probs * (dprob - (probs * dprob).sum(1, keepdim=True) + 2.0 * dz * lse)
        if mask_T is not None:
            from_sums = from_sums.where(mask_T.bool(), 0.0)
        dlogits = dlogits + from_sums
    dlogits = _tokens_first(dlogits)
    return dlogits, [d.sum(0) for d in dlogits.unbind(1)] if need_dbias else []


def dweights_of(dlogits_THE: Tensor, x: Tensor) -> list[Tensor]:
    """The gradient of the weight of each router that reads x, in the routers' precision."""
    with workspace.scope():
        dweights = dlogits_THE.flatten(1).T.mm(workspace.cast(x, dlogits_THE.dtype)).split(dlogits_THE.shape[2])
    return [dweight.clone() for dweight in dweights]


def columns_of(dlogits_THE: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(T, C) in ``dtype``, whose product with x^T is the weights' gradient, for whoever multiplies x^T anyway: in bf16
    two terms of each column, which hold 16 of its bits. None in fp16, whose range is too small for gradients."""
    columns = dlogits_THE.flatten(1)
    if dtype == torch.bfloat16:
        high = columns.to(dtype)
        return torch.cat([high, (columns - high).to(dtype)], dim=1)
    return columns if dtype == columns.dtype else None


def dweights_of_columns(products_CK: Tensor, dlogits_THE: Tensor) -> list[Tensor]:
    """As :func:`dweights_of`, from the transposed product of x^T with :func:`columns_of`."""
    _, heads, experts = dlogits_THE.shape
    terms = products_CK.to(dlogits_THE.dtype).view(-1, heads, experts, products_CK.shape[1])
    return [own[0].clone() if len(own) == 1 else own.sum(0) for own in terms.unbind(1)]
