"""Tokens sorted by the experts they chose: what the portable grouped form computes on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST_EXPERTS = 64
"""That the C++ kernels group tokens by: a set of them is the bits of one number."""
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
    groups: list[list[int]]
    """The M experts of each group, ascending."""
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
    used_TE = gates_TE != 0
    if by_set:
        tokens_V, sizes, groups = _by_set(used_TE)
        if any(len(group) != top_k for group in groups):
            tokens_V, sizes, groups = _by_set(_largest(gates_TE, top_k))
    else:
        enough = bool((used_TE.sum(1) == top_k).all())
        tokens_V, sizes, groups = _by_expert(used_TE if enough else _largest(gates_TE, top_k))
    groups_GM = torch.tensor(groups, dtype=torch.int64, device=gates_TE.device).view(-1, top_k if by_set else 1)
    experts_VM = groups_GM.repeat_interleave(sizes, dim=0, output_size=len(tokens_V))
    gates_VM = gates_TE.index_select(0, tokens_V).gather(1, experts_VM)
    return Order(tokens_V, experts_VM, gates_VM, sizes.tolist(), groups, experts, by_set)


def _by_set(chosen_TE: Tensor) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Tokens by their set of experts, the sizes of the groups and the experts of each."""
    experts = range(chosen_TE.shape[1])
    bits = torch.tensor([2**e for e in experts], dtype=torch.float32, device=chosen_TE.device)
    keys = chosen_TE.float().mv(bits).sort(stable=True)
    sets, sizes = torch.unique_consecutive(keys.values, return_counts=True)
    return keys.indices, sizes, [[e for e in experts if int(chosen) >> e & 1] for chosen in sets.tolist()]


def _by_expert(chosen_TE: Tensor) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The same, each token once with each of its experts."""
    visits = chosen_TE.T.nonzero()  # in the order of the experts, and of the tokens of each
    experts, sizes = torch.unique_consecutive(visits[:, 0], return_counts=True)
    return visits[:, 1].contiguous(), sizes, [[expert] for expert in experts.tolist()]


def _largest(gates_TE: Tensor, top_k: int) -> Tensor:
    """(T, E) bool, true ``top_k`` times for each token."""
    best = gates_TE.abs().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(gates_TE, dtype=torch.bool).scatter_(1, best, True)
