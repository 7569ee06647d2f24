"""The masks of ``molora_kernels/dropout.py`` inside a kernel, bit for bit.

A kernel makes its rows' keys once, then one mask per tile of columns:

    b_keys = row_keys(p_seed, o_t, stream)                   # o_t: row indices
    m_kept = kept(b_keys, i_k * BLOCK_K, threshold, BLOCK_K) # (len(o_t), BLOCK_K) bool
    b_x = tl.where(m_kept, b_x * scale, 0.0)                 # threshold(p) and survivor_scale(p) from the host
"""

import triton
import triton.language as tl

from molora_kernels.dropout import GOLDEN, MULTIPLIERS

_GOLDEN: tl.constexpr = tl.constexpr(GOLDEN)
_MULTIPLIER_0: tl.constexpr = tl.constexpr(MULTIPLIERS[0])
_MULTIPLIER_1: tl.constexpr = tl.constexpr(MULTIPLIERS[1])


@triton.jit
def _mix(b_x):
    """The 32-bit finaliser; uint32 products wrap."""
    b_x ^= b_x >> 16
    b_x *= _MULTIPLIER_0
    b_x ^= b_x >> 15
    b_x *= _MULTIPLIER_1
    b_x ^= b_x >> 16
    return b_x


@triton.jit
def row_keys(p_seed, o_t, stream):
    """One uint32 key per row from the int64 seed at ``p_seed``; ``stream`` as in ``dropout_mask``."""
    b_seed = tl.load(p_seed)
    b_low = b_seed.to(tl.uint32)
    # tl.cast, not .to: a launch turns an integer argument of 1 into a constexpr
    b_high = (b_seed >> 32).to(tl.uint32) + tl.cast(stream, tl.uint32) * _GOLDEN
    return _mix(_mix(o_t.to(tl.uint32) ^ b_low) + b_high)


@triton.jit
def kept(b_keys, start, threshold, BLOCK_K: tl.constexpr):
    """Which elements of columns ``start … start + BLOCK_K`` survive: (len(b_keys), BLOCK_K) bool.

    ``start`` is even: two columns share a word, the even one its low half, and each word is hashed once. Every layout
    that gives a thread pairs of columns takes the mask without an exchange between threads.
    """
    o_pair = start // 2 + tl.arange(0, BLOCK_K // 2)
    b_words = _mix(b_keys[:, None] + (o_pair.to(tl.uint32) * _GOLDEN)[None, :])
    return tl.interleave((b_words & 0xFFFF) >= threshold, (b_words >> 16) >= threshold)
