"""Choosing among arguments in a kernel that does several products in one launch."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's arguments can be tuples, whose length a kernel knows when it is compiled.)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(options, i):
    """options[i] of a tuple of pointers or numbers, for an i that is only known when the kernel runs."""
    chosen = options[0]
    for j in tl.static_range(1, len(options)):
        chosen = tl.where(i == j, options[j], chosen)
    return chosen


@triton.jit
def pick_block(sizes, i_block, BLOCK: tl.constexpr):
    """(i, its own i_block) where the blocks of a tuple of sizes follow one another."""
    i, i_own, i_first = 0, i_block, 0
    for j in tl.static_range(1, len(sizes)):
        i_first += tl.cdiv(sizes[j - 1], BLOCK)
        i_own = tl.where(i_block >= i_first, i_block - i_first, i_own)
        i = tl.where(i_block >= i_first, j, i)
    return i, i_own
