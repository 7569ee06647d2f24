"""Dropout masks from a counter: the same bits in every backend, in forward and in backward, and never stored.

A 32-bit hash of (seed, row, pair of columns) gives two 16-bit words, one per element. An element is dropped when its
word is below ``threshold = round(p * 65536)``; survivors are scaled by ``65536 / (65536 - threshold)``, so that the
expectation is exact for the rounded p. The hash is a multiply-xorshift finaliser with the constants of Chris Wellons'
``lowbias32`` (https://nullprogram.com/blog/2018/07/31/); why not Philox: docs/adr/0003-dropout-from-a-hash.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from molora_kernels import workspace
from molora_kernels.one_pass import compiled, one_pass

GOLDEN = 0x9E3779B9
"""2^32 / golden ratio: steps column counters far apart in the hash's input."""
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)

_CHUNK = 1 << 16  # words hashed at a time: small enough for the temporaries to stay in a core's cache


def threshold(p: float) -> int:
    """16-bit words below this are dropped."""
    return min(round(p * 65536), 65535)


def survivor_scale(p: float) -> float:
    """What kept elements are multiplied by."""
    return 65536 / (65536 - threshold(p))


def check_dropout(who: str, p: float, seed: Tensor | None) -> None:
    """Raise ValueError, in the name of ``who``, for a probability out of range or dropout without a seed tensor."""
    if not 0 <= p < 1:
        raise ValueError(f"{who}: dropout_p={p} must lie in [0, 1)")
    if p and not (isinstance(seed, Tensor) and seed.ndim == 0 and seed.dtype == torch.int64):
        raise ValueError(f"{who}: dropout_p > 0 needs dropout_seed, an int64 scalar tensor on x's device")


def new_dropout_seed(device: torch.device) -> Tensor:
    """A fresh () int64 seed, drawn on ``device`` by its own generator: no synchronisation with the host, and activation
    checkpointing, which restores that generator before it recomputes, draws the same one."""
    return torch.randint(0, 2**63 - 1, (), device=device)


def dropout_mask(seed: Tensor, rows: int, columns: int, p: float, stream: int = 0) -> Tensor:
    """Which elements of a ``(rows, columns)`` input are kept.

    Args:
        seed: () int64; any value. Read on the device it is on, without synchronising with the host.
        p: probability of dropping, ``0 <= p < 1``; used rounded to 1/65536.
        stream: tells apart the masks of several inputs that share one seed.

    Returns:
        (rows, columns) bool on ``seed``'s device, true where kept.

    Raises:
        ValueError: ``p`` outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout p={p}: it must lie in [0, 1)")
    keys = _row_keys(seed, torch.arange(rows, device=seed.device), stream)
    kept = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    pair_keys = _column_keys(torch.arange((columns + 1) // 2, device=seed.device))
    for kept_n, keys_n in _in_cache(columns, kept, keys):
        _keep(keys_n, pair_keys, p, kept_n)
    return kept


class Dropout(NamedTuple):
    """A mask that is drawn wherever it is needed. Arguments as in :func:`dropout_mask`; no seed is needed for p = 0."""

    seed: Tensor | None
    p: float
    stream: int

    def dropped(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x, or in the workspace, zero where dropped; its rows are those of ``tokens``, or of all in turn."""
        return self._drop(x, tokens, workspace.empty(x, *x.shape)) if self.p else x

    def drop_(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The same in place."""
        return self._drop(x, tokens, x) if self.p else x

    def _drop(self, x: Tensor, tokens: Tensor | None, out: Tensor) -> Tensor:
        assert self.seed is not None
        keys = _row_keys(self.seed, torch.arange(len(x), device=x.device) if tokens is None else tokens, self.stream)
        columns = torch.arange(x.shape[1], device=x.device)
        if compiled(x):
            how = keys, _column_keys(columns // 2), (columns % 2 * 16).to(torch.int32), threshold(self.p)
            _drop_in_place(x, *how) if out is x else _drop_into(out, x, *how)
            return out
        pair_keys = _column_keys(columns[: (len(columns) + 1) // 2])
        for x_n, out_n, keys_n in _in_cache(len(columns), x, out, keys):
            kept = torch.empty(x_n.shape, dtype=torch.bool, device=x.device)
            torch.mul(x_n, _keep(keys_n, pair_keys, self.p, kept), out=out_n)
        return out


@one_pass(rows=3)
def _drop_into(out: Tensor, x: Tensor, row_keys: Tensor, column_keys: Tensor, shifts: Tensor, threshold: int) -> None:
    """Each element's word is hashed anew, where :func:`_keep` hashes one for two: without a view of halves this is one
    loop."""
    words = _mix(row_keys[:, None] + column_keys)
    out.copy_(torch.where(((words >> shifts) & 0xFFFF) >= threshold, x, 0.0))


@one_pass(rows=2)
def _drop_in_place(x: Tensor, row_keys: Tensor, column_keys: Tensor, shifts: Tensor, threshold: int) -> None:
    _drop_into.__wrapped__(x, x, row_keys, column_keys, shifts, threshold)


def _keep(row_keys: Tensor, pair_keys: Tensor, p: float, kept: Tensor) -> Tensor:
    words = _mix(row_keys[:, None] + pair_keys)
    # With the top bits turned over, halves as signed numbers are in the order of the unsigned ones. A word's low
    # half belongs to the even column: what a little-endian view of int32 as int16 gives.
    words ^= _signed(0x80008000)
    return torch.ge(words.view(torch.int16)[:, : kept.shape[1]], threshold(p) - 32768, out=kept)


def _in_cache(columns: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows at a time, so few that the temporaries of their words stay in a core's cache; elsewhere all at once."""
    if tensors[0].device.type != "cpu":
        return iter([tensors])
    return zip(*(t.split(max(1, 2 * _CHUNK // max(columns, 1))) for t in tensors), strict=True)


def _row_keys(seed: Tensor, rows: Tensor, stream: int) -> Tensor:
    low = _to_int32(seed & 0xFFFFFFFF)
    high = _to_int32(((seed >> 32) + stream * GOLDEN) & 0xFFFFFFFF)
    return _mix(_mix(rows.to(torch.int32) ^ low) + high)


def _column_keys(pairs: Tensor) -> Tensor:
    return _to_int32(pairs * GOLDEN)


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser; int32, overwritten (PyTorch's >> is arithmetic, hence the masks; products wrap)."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(MULTIPLIERS[0])
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(MULTIPLIERS[1])
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _to_int32(x: Tensor) -> Tensor:
    """int64 values modulo 2^32 as int32."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)
