"""Dropout masks from a counter: the same bits in every backend, in forward and in backward, and never stored.

A 32-bit hash of (seed, row, pair of columns) gives two 16-bit words, one per element. An element is dropped when its
word is below ``threshold = round(p * 65536)``; survivors are scaled by ``65536 / (65536 - threshold)``, so that the
expectation is exact for the rounded p. The hash is a multiply-xorshift finaliser with the constants of Chris Wellons'
``lowbias32`` (https://nullprogram.com/blog/2018/07/31/); why not Philox: docs/adr/0003-dropout-from-a-hash.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    row_keys = _row_keys(seed, rows, stream)
    pairs = (columns + 1) // 2
    column_keys = _to_int32(torch.arange(pairs, device=seed.device) * GOLDEN)
    kept = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    step = max(1, _CHUNK // max(pairs, 1))
    for start in range(0, rows, step):
        words = _mix_(row_keys[start : start + step, None] + column_keys)
        # With the top bits turned over, halves as signed numbers are in the order of the unsigned ones. A word's low
        # half belongs to the even column: what a little-endian view of int32 as int16 gives.
        words ^= _signed(0x80008000)
        halves = words.view(torch.int16)[:, :columns]
        torch.ge(halves, threshold(p) - 32768, out=kept[start : start + step])
    return kept


def _row_keys(seed: Tensor, rows: int, stream: int) -> Tensor:
    low = _to_int32(seed & 0xFFFFFFFF)
    high = _to_int32(((seed >> 32) + stream * GOLDEN) & 0xFFFFFFFF)
    keys = torch.arange(rows, device=seed.device).to(torch.int32) ^ low
    return _mix_(_mix_(keys) + high)


def _mix_(x: Tensor) -> Tensor:
    """The 32-bit finaliser, in place on int32 (PyTorch's >> is arithmetic, hence the masks; products wrap)."""
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
