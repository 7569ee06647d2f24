"""The public SwiGLU block with routed experts: checks its input, picks the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from molora_kernels import autocast
from molora_kernels.backend import reference_chosen, require_one_device
from molora_kernels.dropout import check_dropout
from molora_kernels.grouped_lora import dispatch
from molora_kernels.mlp_block import op, reference


class Projection(NamedTuple):
    """A frozen linear and its experts. Shapes as in :func:`molora_kernels.grouped_lora`."""

    weight: Tensor
    """(N, K), frozen."""
    lora_a: Tensor
    """(E * r, K)"""
    lora_b: Tensor
    """(N, E * r)"""
    bias: Tensor | None = None
    """(N,), frozen."""


class Router(NamedTuple):
    """One router. Shapes as in :func:`molora_kernels.router`, without the leading H."""

    weight: Tensor
    """(E, K), fp32."""
    bias: Tensor | None = None
    """(E,), fp32."""
    selection_bias: Tensor | None = None
    """(E,), fp32, no gradient."""


class MlpOutput(NamedTuple):
    y: Tensor
    """(..., K) in x's dtype."""
    sums: Tensor
    """(H, 1 + E) as in :class:`molora_kernels.Routing`, H routers in the order given."""
    counts: Tensor
    """(H, E), likewise."""
    gates: tuple[Tensor, ...]
    """H of (..., E) fp32: each token's weight of each expert, zero where not chosen. To look at: they carry no
    gradient."""


def mlp_block(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    routers: Sequence[Router] = (),
    *,
    top_k: int = 1,
    scaling: float,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> MlpOutput:
    """``down(silu(gate(x)) * up(x))`` with LoRA experts on the three projections, with one backward.

    Each projection is that of :func:`molora_kernels.grouped_lora`, its gates those of :func:`molora_kernels.router`;
    SwiGLU is arXiv 2002.05202, eq. 6.

    Args:
        x: (..., K), fp16, bf16, fp32 or fp64.
        gate, up: N = I (intermediate), K features. down: N = K, I features.
        routers: three, one per projection in the order gate, up, down (down's reads the intermediate); or one that
            reads x and gates all three; or none, for a plain LoRA on each.
        top_k: experts per token. Whether the others are computed too: :class:`molora_kernels.use_form`.
        scaling: ``alpha / r``.
        mask: (...) bool; only true tokens count in ``sums`` and ``counts``.
        dropout_p, dropout_seed: dropout of the adapters' inputs, as in ``grouped_lora``: one mask for gate and up
            (stream 0), one for down (stream 1).

    Returns:
        :class:`MlpOutput`. ``sums`` is differentiable.

    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit; a base weight that requires grad; dropout without
            a seed.
    """
    leading = x.shape[:-1]
    x, weights = autocast.follow(x, [p.weight for p in (gate, up, down)])
    projections = [p._replace(weight=w) for p, w in zip((gate, up, down), weights, strict=True)]
    biases = autocast.follow(x, _all_or_none([p.bias for p in projections], weights))[1]
    _check(x, projections, biases, routers, top_k, mask, dropout_p, dropout_seed)
    x = x.reshape(-1, x.shape[-1])
    args = (
        x,
        weights,
        biases,
        [p.lora_a for p in projections],
        [p.lora_b for p in projections],
        [r.weight for r in routers],
        _all_or_none([r.bias for r in routers], [r.weight for r in routers]),
        _all_or_none([r.selection_bias for r in routers], [r.weight for r in routers]),
        None if mask is None else mask.reshape(-1),
        dropout_seed,
        top_k,
        scaling,
        dropout_p,
    )
    with autocast.off(x):
        if reference_chosen():
            y, sums, counts, gates = reference.mlp_block(*args)
        else:
            experts = routers[0].weight.shape[0] if routers else 1
            form = dispatch.form_for(x, experts, top_k, gate.lora_a.shape[0] // experts)
            y, sums, counts, saved, h = op.mlp_block(*args, form)
            if form == "dense":
                bias = biases[2] if biases else None
                y = op.down(y, h, *op.of_down(saved), weights[2], bias, down.lora_b, scaling)
            gates = op.gates_of(saved)
    each = tuple(g.detach().view(*leading, g.shape[-1]) for routed in gates for g in routed.unbind(1))
    return MlpOutput(y.view(*leading, y.shape[-1]), sums, counts.detach(), each)


def _all_or_none(given: list[Tensor | None], weights: list[Tensor]) -> list[Tensor]:
    """An empty list if nothing is given, else all, with zeros, one for each row of its weight, where one is absent."""
    if all(t is None for t in given):
        return []
    return [w.detach().new_zeros(w.shape[0]) if t is None else t for t, w in zip(given, weights, strict=True)]


def _check(
    x: Tensor,
    projections: Sequence[Projection],
    biases: Sequence[Tensor],
    routers: Sequence[Router],
    top_k: int,
    mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> None:
    hidden, intermediate = x.shape[-1], projections[0].weight.shape[0]
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    for name, p, (out_features, in_features) in zip(("gate", "up", "down"), projections, shapes, strict=True):
        rank = p.lora_a.shape[0]
        if (
            p.weight.shape != (out_features, in_features)
            or p.lora_a.shape != (rank, in_features)
            or p.lora_b.shape != (out_features, rank)
        ):
            raise ValueError(
                f"mlp_block: {name} has weight {tuple(p.weight.shape)}, A {tuple(p.lora_a.shape)}, "
                f"B {tuple(p.lora_b.shape)}; expected {(out_features, in_features)}, ({rank}, {in_features}), "
                f"({out_features}, {rank})"
            )
        if p.weight.dtype != x.dtype:
            raise ValueError(f"mlp_block: x is {x.dtype} but {name}'s weight is {p.weight.dtype}")
        if name == "up" and rank != (other := projections[0].lora_a.shape[0]):
            raise ValueError(f"mlp_block: up has the total rank {rank} and gate {other}; expected the same")
        if p.weight.requires_grad or (p.bias is not None and p.bias.requires_grad):
            raise ValueError(f"mlp_block: {name}'s weight or bias requires grad; base weights are frozen here")
    for (out_features, _), bias in zip(shapes, biases, strict=False):  # none, or three
        if bias.shape != (out_features,) or bias.dtype != x.dtype:
            raise ValueError(
                f"mlp_block: a bias is {tuple(bias.shape)} {bias.dtype}; expected ({out_features},) {x.dtype}"
            )
    if len(routers) not in (0, 1, 3):
        raise ValueError(f"mlp_block: {len(routers)} routers; expected three, one that is shared, or none")
    for i, r in enumerate(routers):
        features = intermediate if i == 2 else hidden
        experts = routers[0].weight.shape[0]
        if r.weight.shape != (experts, features) or projections[i].lora_a.shape[0] % experts:
            raise ValueError(
                f"mlp_block: router {i} is {tuple(r.weight.shape)}; expected ({experts}, {features}) and a total rank "
                f"that {experts} divides"
            )
        for given in (r.bias, r.selection_bias):
            if given is not None and given.shape != (experts,):
                raise ValueError(f"mlp_block: a bias of router {i} is {tuple(given.shape)}; expected ({experts},)")
        if not 1 <= top_k <= experts:
            raise ValueError(f"mlp_block: top_k={top_k} must lie between 1 and the number of experts, {experts}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(
            f"mlp_block: mask is {tuple(mask.shape)}; expected the leading shape of x, {tuple(x.shape[:-1])}"
        )
    check_dropout("mlp_block", dropout_p, dropout_seed)
    own = (t for p in projections for t in (p.weight, p.bias, p.lora_a, p.lora_b))
    routed = (t for r in routers for t in (r.weight, r.bias, r.selection_bias))
    require_one_device("mlp_block", x, (*own, *routed, mask, dropout_seed))
