"""The router in plain PyTorch with a hand-written backward: what the ``torch`` backend runs, and ``inductor`` but for
what is done with logits (``cpp.py``).

Shape letters: T tokens, K input features, H routers that read the same input, E experts. All router arithmetic is
fp32 (fp64 for fp64 inputs), whatever the dtype of x; but for the weights' gradient from bf16 rows where it rides on the
adapters' (:func:`columns_of`), which is rounded once, as theirs is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora_kernels import workspace
from molora_kernels.one_pass import compiled, one_pass
from molora_kernels.router import cpp


def forward(
    x_TK: Tensor,
    weight_HEK: Tensor,
    bias_HE: Tensor | None,
    selection_bias_HE: Tensor | None,
    mask_T: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates (T, H, E), logits (T, H, E), sums (H, 1 + E), counts (H, E)."""
    heads, experts, features = weight_HEK.shape
    dtype = torch.promote_types(torch.float32, x_TK.dtype)
    weight = weight_HEK.reshape(heads * experts, features).to(dtype)
    logits = _logits_of(x_TK, weight).view(-1, heads, experts)
    if cpp.serves(logits):
        return cpp.forward(logits, bias_HE, selection_bias_HE, mask_T, top_k)
    if bias_HE is not None:
        logits += bias_HE.to(dtype)
    logits_HET = _experts_first(logits)
    probs = torch.softmax(logits_HET, dim=1)
    chosen = _choose(logits_HET if selection_bias_HE is None else probs + selection_bias_HE.to(dtype)[..., None], top_k)

    # Renormalised, the chosen probabilities are the softmax over the chosen logits, which cannot become 0 / 0.
    gates = probs * chosen if top_k == 1 else torch.softmax(logits_HET.masked_fill(chosen == 0, float("-inf")), dim=1)

    terms = torch.cat([torch.logsumexp(logits_HET, dim=1, keepdim=True).square_(), probs], dim=1)
    if mask_T is not None:
        # select, do not multiply: a padding token may hold anything, and NaN * 0 is NaN
        valid = mask_T.bool()
        terms, chosen = terms.where(valid, 0.0), chosen.where(valid, 0.0)
    return _tokens_first(gates), logits, terms.sum(-1), chosen.sum(-1)


_FEW = 16
"""Up to so many logits, rows of 16 bits are multiplied as they are read; beyond, a product of a copy is faster."""


def _logits_of(x_TK: Tensor, weight_EK: Tensor) -> Tensor:
    """(T, E) in the weights' dtype."""
    if x_TK.dtype != weight_EK.dtype and len(weight_EK) <= _FEW and compiled(x_TK):
        logits = x_TK.new_empty(len(x_TK), len(weight_EK), dtype=weight_EK.dtype)
        _multiply(x_TK, logits, weight_EK)
        return logits
    with workspace.scope():
        return torch.mm(workspace.cast(x_TK, weight_EK.dtype), weight_EK.T)


@one_pass(rows=2)
def _multiply(x: Tensor, out: Tensor, weight: Tensor) -> None:
    out.copy_((x[:, None].to(weight.dtype) * weight).sum(-1))


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
    dlogits = dlogits_of(dgates_THE, dsums_HS, logits_THE, gates_THE, mask_T, top_k)
    flat = dlogits.view(-1, heads * experts)
    dx, dweight, dbias = x_TK.new_empty(0), flat.new_empty(0), flat.new_empty(0)
    if need_dx:
        weight = weight_HEK.reshape(heads * experts, features).to(flat.dtype)
        dx = torch.mm(flat, weight).to(x_TK.dtype)
    if need_drouter:
        with workspace.scope():
            dweight = torch.mm(flat.T, workspace.cast(x_TK, flat.dtype)).view(heads, experts, features)
        dbias = dlogits.sum(0)
    return dx, dweight, dbias


def dlogits_of(
    dgates_THE: Tensor | None,
    dsums_HS: Tensor | None,
    logits_THE: Tensor,
    gates_THE: Tensor,
    mask_T: Tensor | None,
    top_k: int,
) -> Tensor:
    """(T, H, E): the gradient of the logits from the gates and from the sums that the router losses read.

    Renormalised gates are a softmax over the chosen logits, so with h_e = g_e dg_e
    ``dlogit_e = h_e - g_e sum_j h_j``; for k = 1 the gate is p itself and p takes the place of g in the second term.
    Of the sums, z gives ``2 lse p_e``, and the probability sums with upstream w give ``p_e (w_e - sum_j w_j p_j)``.
    """
    if cpp.serves(logits_THE):
        return cpp.dlogits_of(dgates_THE, dsums_HS, logits_THE, gates_THE, mask_T, top_k)
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
    return _tokens_first(dlogits)


def grads_of(dlogits_THE: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The gradients of weight and bias of each router that reads x, in the routers' precision."""
    with workspace.scope():
        dweights = dlogits_THE.flatten(1).T.mm(workspace.cast(x, dlogits_THE.dtype)).split(dlogits_THE.shape[2])
    return [(dweight.clone(), dlogits.sum(0)) for dweight, dlogits in zip(dweights, dlogits_THE.unbind(1), strict=True)]


def columns_of(dlogits_THE: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(T, C) in ``dtype``, whose product with x^T is the weights' gradient, for whoever multiplies x^T anyway: in bf16
    two terms of each column, which hold 16 of its bits. None in fp16, whose range is too small for gradients."""
    columns = dlogits_THE.flatten(1)
    if dtype == torch.bfloat16:
        high = columns.to(dtype)
        return torch.cat([high, (columns - high).to(dtype)], dim=1)
    return columns if dtype == columns.dtype else None


def grads_of_columns(products_CK: Tensor, dlogits_THE: Tensor) -> list[tuple[Tensor, Tensor]]:
    """As :func:`grads_of`, from the transposed product of x^T with :func:`columns_of`."""
    _, heads, experts = dlogits_THE.shape
    terms = products_CK.to(dlogits_THE.dtype).reshape(-1, heads, experts, products_CK.shape[1])
    return [
        (dweight.clone(), dlogits.sum(0)) for dweight, dlogits in zip(terms.sum(0), dlogits_THE.unbind(1), strict=True)
    ]
