"""Several rows in one sequence, so that a batch is tokens rather than padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from molora import chat
from molora.data import Example, Examples


def pack(examples: Examples, max_length: int) -> Examples:
    """``examples`` packed into sequences of at most ``max_length`` tokens.

    The first token of a row has no label, as in a batch of its own: what comes before it is another row. Which rows
    come together depends on their lengths and order alone, so that a run can be resumed.
    """
    rows = examples.rows
    packs = [[rows[i] for i in pack] for pack in best_fit_decreasing([len(row.input_ids) for row in rows], max_length)]
    return Examples([_joined(pack) for pack in packs], examples.truncated, examples.dropped)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in packs whose sums are at most ``capacity``: the longest first, each into the pack that
    it fills best. Needs at most 11/9 of the best possible number of packs and one more (Johnson 1973).
    """
    packs: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the room that they have left
    some = 0  # bit n is set where room[n] is not empty, so that the best fit is found without a search
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        if length > capacity:
            raise ValueError(f"length {length} is more than a pack's {capacity}")
        if fitting := some >> length:
            left = length + (fitting & -fitting).bit_length() - 1
            pack = room[left].pop()
            if not room[left]:
                some ^= 1 << left
        else:
            left, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(i)
        room[left - length].append(pack)
        some |= 1 << (left - length)
    return packs


def _joined(rows: Sequence[Example]) -> Example:
    labels = torch.cat([row.labels for row in rows])
    lengths = tuple(len(row.input_ids) for row in rows)
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    labels[starts] = chat.IGNORE
    return Example(
        torch.cat([row.input_ids for row in rows]),
        labels,
        "+".join(sorted({row.domain for row in rows})),
        ", ".join(row.where for row in rows),
        lengths,
        tuple(row.domain for row in rows),
    )
