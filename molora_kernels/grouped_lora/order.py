"""Tokens sorted by the experts they chose: what the portable grouped form computes on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST_SETS = 16
"""Up to so many sets of experts, tokens are sorted by set and each is visited once; beyond, groups would be small."""


class Order(NamedTuple):
    """V visits of tokens, group after group; those of a group compute the same M experts. One visit of each token with
    its whole set of M = k chosen experts; or, where there are many sets, one with each of its experts, M = 1."""

    tokens: Tensor
    """(V,), ascending within a group; no token is twice in one."""
    experts: Tensor
    """(V, M), ascending."""
    gates: Tensor
    """(V, M)"""
    sizes: list[int]
    """Visits of each group; none is empty."""
    groups: Tensor
    """(G, M): the experts of each group."""
    total: int
    """Experts that there are."""
    by_set: bool
    """Whether each token is visited once, so that the order is a permutation."""

    def positions(self) -> Tensor:
        """(T,): where each token is, in an order by set."""
        places = torch.arange(len(self.tokens), device=self.tokens.device)
        return torch.empty_like(places).index_copy_(0, self.tokens, places)


def sorted_by_set(experts: int, top_k: int) -> bool:
    return math.comb(experts, top_k) <= MOST_SETS


def order_of(gates_TE: Tensor, top_k: int) -> Order:
    """Chosen are the ``top_k`` gates of largest magnitude, ties to the lower index: a chosen gate may have underflowed
    to zero, and then another zero may take its place."""
    experts, by_set = gates_TE.shape[1], sorted_by_set(gates_TE.shape[1], top_k)
    chosen_TE, bits = _chosen(gates_TE, top_k), torch.arange(experts, device=gates_TE.device)
    if by_set:
        keys = chosen_TE.float().mv(2 ** bits.float()).sort(stable=True)  # a bit for each expert
        tokens_V = keys.indices
    else:
        visits = chosen_TE.nonzero()
        keys = visits[:, 1].sort(stable=True)
        tokens_V = visits[:, 0].index_select(0, keys.indices)
    found, sizes = torch.unique_consecutive(keys.values, return_counts=True)
    groups = found.long()[:, None]
    if by_set:
        groups = (groups >> bits & 1).nonzero()[:, 1].view(-1, top_k)
    experts_VM = groups.repeat_interleave(sizes, dim=0, output_size=len(tokens_V))
    gates_VM = gates_TE.index_select(0, tokens_V).gather(1, experts_VM)
    return Order(tokens_V, experts_VM, gates_VM, sizes.tolist(), groups, experts, by_set)


def _chosen(gates_TE: Tensor, top_k: int) -> Tensor:
    """(T, E) bool, true ``top_k`` times for each token."""
    used = gates_TE != 0
    if bool((used.sum(1) == top_k).all()):
        return used
    best = gates_TE.abs().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(used).scatter_(1, best, True)
