"""The public function for a few tokens without gradient: checks its input, picks the backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from molora_kernels.backend import require_one_device
from molora_kernels.few_tokens import cpp, portable


def few_tokens(
    x: Tensor,
    outputs: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *,
    scaling: float,
    router_weights: Sequence[Tensor] = (),
    router_biases: Sequence[Tensor] = (),
    top_k: int = 1,
    gates: Tensor | None = None,
) -> Tensor | None:
    """What :func:`molora_kernels.router` and :func:`molora_kernels.grouped_lora` do, for generation: one call adds to
    the outputs of G frozen projections what their experts make of the input that they share. Adapters are multiplied as
    they are, in fp32 (fp64). Made for up to some 64 tokens, without a gradient.

    Args:
        x: (..., K), fp16, bf16, fp32 or fp64.
        outputs: G of (..., N_g), contiguous: what the frozen linears gave. Added to in place.
        lora_a, lora_b: G of (E * r, K) and of (N_g, E * r), no narrower than x, of one dtype.
        scaling: ``alpha / r``.
        router_weights, router_biases: H of (E, K) and of (E,), with H = G, or H = 1 to share, in the adapters' dtype;
            none where gates are given or there is one expert.
        top_k: experts per token that routers choose.
        gates: (H, T, E) of the T tokens of x, in place of routers.

    Returns:
        The gates, (H, T, E), zero where an expert was not chosen; None without routers and gates.

    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit; a gradient is asked for.
    """
    masters = (*lora_a, *lora_b, *router_weights, *router_biases)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *outputs, *masters)):
        raise ValueError("few_tokens: has no gradient; call it under torch.no_grad(), or grouped_lora")
    _check(x, outputs, lora_a, lora_b, router_weights, router_biases, top_k, gates)
    require_one_device("few_tokens", x, (*outputs, *masters, gates))
    x_TK, flat = x.reshape(-1, x.shape[-1]), [y.view(-1, y.shape[-1]) for y in outputs]
    own = cpp if cpp.serves(x_TK, flat, masters) else portable
    return own.few_tokens(x_TK, flat, lora_a, lora_b, scaling, router_weights, router_biases, top_k, gates)


def _check(
    x: Tensor,
    outputs: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    router_weights: Sequence[Tensor],
    router_biases: Sequence[Tensor],
    top_k: int,
    gates: Tensor | None,
) -> None:
    *leading, features = x.shape
    dtype = lora_a[0].dtype if lora_a else x.dtype
    groups, heads, experts = len(outputs), len(router_weights), 1
    if not groups == len(lora_a) == len(lora_b) > 0 or len(router_biases) != heads or (heads and gates is not None):
        raise ValueError(
            f"few_tokens: {groups} outputs, {len(lora_a)} lora_a, {len(lora_b)} lora_b, {heads} router_weights, "
            f"{len(router_biases)} router_biases{'' if gates is None else ' and gates'}; expected as many of the first "
            "three, as many of the next two, and gates only without them"
        )
    if heads:
        experts = router_weights[0].shape[0]
        for weight, bias in zip(router_weights, router_biases, strict=True):
            if weight.shape != (experts, features) or bias.shape != (experts,):
                raise ValueError(
                    f"few_tokens: a router is {tuple(weight.shape)} and {tuple(bias.shape)}; expected "
                    f"({experts}, {features}) and ({experts},)"
                )
        if not 1 <= top_k <= experts:
            raise ValueError(f"few_tokens: top_k={top_k} must lie between 1 and the number of experts, {experts}")
    elif gates is not None:
        if gates.ndim != 3 or gates.shape[1] != math.prod(leading):
            raise ValueError(f"few_tokens: gates are {tuple(gates.shape)}; expected (H, {math.prod(leading)}, E)")
        heads, _, experts = gates.shape
    rank = lora_a[0].shape[0]
    if heads not in (0, 1, groups) or rank % experts:
        raise ValueError(
            f"few_tokens: {heads} gate sets of {experts} experts for {groups} projections and a total rank of {rank}; "
            f"expected one set or {groups}, of experts that divide the rank"
        )
    for y, a, b in zip(outputs, lora_a, lora_b, strict=True):
        n = y.shape[-1]
        if a.shape != (rank, features) or b.shape != (n, rank) or [*y.shape] != [*leading, n]:
            raise ValueError(
                f"few_tokens: an output is {tuple(y.shape)} with A {tuple(a.shape)} and B {tuple(b.shape)} for x "
                f"{tuple(x.shape)}; expected {(*leading, n)}, ({rank}, {features}) and ({n}, {rank})"
            )
        if not y.is_contiguous():
            raise ValueError(f"few_tokens: an output {tuple(y.shape)} has strides {y.stride()}; expected it contiguous")
    for t in (*lora_a, *lora_b, *router_weights, *router_biases):
        if t.dtype != dtype:
            raise ValueError(f"few_tokens: a tensor of adapters or routers is {t.dtype} and the first {dtype}")
