"""Tokens sorted by the experts they chose: what the grouped form computes on."""

from __future__ import annotations

import itertools
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


def groups_of(gates_TE: Tensor, top_k: int) -> list[Group]:
    """Non-empty groups of tokens. Each token is in one group, of its whole set of chosen experts; or, where there are
    many sets, in ``top_k`` groups of one expert each.

    Chosen are the ``top_k`` gates of largest magnitude, ties to the lower index: a chosen gate may have underflowed to
    zero, and then another zero may take its place.
    """
    experts = gates_TE.shape[1]
    best = gates_TE.abs().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    chosen = torch.zeros_like(gates_TE, dtype=torch.bool).scatter_(1, best, True)
    if math.comb(experts, top_k) <= MOST_SETS:
        sets = list(itertools.combinations(range(experts), top_k))
        members = torch.tensor(sets, device=gates_TE.device)
        belongs = chosen[:, members].all(-1)
    else:
        sets, belongs = [(e,) for e in range(experts)], chosen
    groups = (Group(belongs[:, i].nonzero().squeeze(1), experts) for i, experts in enumerate(sets))
    return [group for group in groups if group.rows.numel()]
