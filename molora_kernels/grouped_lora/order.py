"""Tokens sorted by the experts they chose: what the grouped form computes on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST_SETS = 16
"""Up to so many sets of experts, tokens are sorted by set and each is visited once; beyond, groups would be small."""


class Group(NamedTuple):
    rows: Tensor
    """(n,) tokens, ascending."""
    experts: tuple[int, ...]
    """What each of these tokens is computed with, ascending."""
    columns: Tensor
    """The same, int64 on the tokens' device."""
    gates: Tensor
    """(n, len(experts)), contiguous."""


def sorted_by_set(experts: int, top_k: int) -> bool:
    return math.comb(experts, top_k) <= MOST_SETS


def groups_of(gates_TE: Tensor, top_k: int) -> list[Group]:
    """Non-empty groups of tokens. Each token is in one group, of its whole set of chosen experts; or, where there are
    many sets, in ``top_k`` groups of one expert each.

    Chosen are the ``top_k`` gates of largest magnitude, ties to the lower index: a chosen gate may have underflowed to
    zero, and then another zero may take its place.
    """
    experts = gates_TE.shape[1]
    best = gates_TE.abs().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    by_set = sorted_by_set(experts, top_k)
    keys = (1 << best).sum(1, keepdim=True) if by_set else best
    ordered = keys.flatten().sort(stable=True)
    found, sizes = (t.tolist() for t in torch.unique_consecutive(ordered.values, return_counts=True))
    groups = []
    for key, rows in zip(found, (ordered.indices // keys.shape[1]).split(sizes), strict=True):
        own = tuple(e for e in range(experts) if key >> e & 1) if by_set else (key,)
        columns = torch.tensor(own, device=gates_TE.device)
        groups.append(Group(rows, own, columns, gates_TE.index_select(0, rows).index_select(1, columns)))
    return groups
