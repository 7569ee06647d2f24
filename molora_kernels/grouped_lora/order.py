"""Tokens sorted by the experts they chose: what the portable grouped form computes on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST_SETS = 16
"""Up to so many sets of experts, tokens are sorted by set and each is visited once; beyond, groups would be small."""


class Group(NamedTuple):
    """Visits that compute the same experts; no token twice."""

    visits: slice
    tokens: Tensor
    """(n,), ascending."""
    experts: tuple[int, ...]
    """Ascending."""


class Order(NamedTuple):
    """V visits of tokens, group after group: one of each token with its whole set of M = k chosen experts; or, where
    there are many sets, one of each of its experts, M = 1."""

    tokens: Tensor
    """(V,)"""
    experts: Tensor
    """(V, M)"""
    gates: Tensor
    """(V, M)"""
    groups: list[Group]


def sorted_by_set(experts: int, top_k: int) -> bool:
    return math.comb(experts, top_k) <= MOST_SETS


def order_of(gates_TE: Tensor, top_k: int) -> Order:
    """Chosen are the ``top_k`` gates of largest magnitude, ties to the lower index: a chosen gate may have underflowed
    to zero, and then another zero may take its place."""
    tokens, experts = gates_TE.shape
    best_Tk = gates_TE.abs().sort(dim=1, descending=True, stable=True).indices[:, :top_k].sort(dim=1).values
    visits = 1 if sorted_by_set(experts, top_k) else top_k
    chosen_VM = best_Tk.reshape(tokens * visits, top_k // visits)
    digits = experts ** torch.arange(chosen_VM.shape[1], device=chosen_VM.device)
    keys = (chosen_VM * digits).sum(1).sort(stable=True)
    chosen_VM = chosen_VM.index_select(0, keys.indices)
    tokens_V = keys.indices // visits
    sizes = torch.unique_consecutive(keys.values, return_counts=True)[1].tolist()
    groups, start = [], 0
    for size in sizes:
        own = slice(start, start + size)
        groups.append(Group(own, tokens_V[own], tuple(chosen_VM[start].tolist())))
        start += size
    return Order(tokens_V, chosen_VM, gates_TE.index_select(0, tokens_V).gather(1, chosen_VM), groups)
