"""Tiles of the grouped LoRA kernels: pure functions of shape, dtype and compute capability.

Shape letters: T tokens, K wide features (input of shrink, output of expand), P columns of the shrink (or R of one
projection), Q = routers * experts, padded, of the logits that ride along; 0 without a router.
"""

from __future__ import annotations

import torch

from molora_kernels._triton.tiles import Capability, Tiles, next_power_of_2, shared_memory_kib

MAX_P = 256
"""Widest block of the shrink: its fp32 accumulator fills 64 registers a thread of two warp groups."""
MAX_Q = 32
"""Most logit columns that ride along: each costs three bf16 products."""
MIN_DOT = 16
"""Fewest columns of a tensor-core product."""
SPLIT_PROGRAMS = 256
"""Programs that a reduction over tokens is split into: about two for each core of an H100. Not the number of cores of
the GPU at hand, so that sums do not depend on it."""


def padded_experts(heads: int, experts: int) -> tuple[int, int]:
    """(HEADS, E_PAD): powers of two whose product a tensor core takes."""
    heads = next_power_of_2(heads)
    return heads, max(next_power_of_2(experts), MIN_DOT // heads)


def padded_logits(Q: int) -> int:
    """Q columns as a tensor core takes them."""
    return max(next_power_of_2(Q), MIN_DOT)


def rides_along(P: int, Q: int, dtype: torch.dtype) -> bool:
    """Whether a router of Q padded columns is worth fusing: one block holds the whole shrink, so x is read once."""
    return Q <= MAX_Q and next_power_of_2(P) <= _widest(dtype)


def shrink_tiles(P: int, Q: int, dtype: torch.dtype, capability: Capability) -> Tiles:
    """``block_t`` rows, ``block_k`` at a time of the features, ``block_n`` columns of the shrink."""
    block_p = _block_p(P, dtype)
    if dtype == torch.float32:
        return Tiles(block_t=32, block_k=32, block_n=block_p, num_warps=4, num_stages=2)
    return _staged(64, 64, block_p, 4 * Q, 8 if block_p == MAX_P else 4, capability)


def weight_tiles(P: int, Q: int, dtype: torch.dtype, capability: Capability) -> Tiles:
    """``block_t`` tokens at a time, ``block_k`` features, ``block_n`` columns of the shrink."""
    block_p = _block_p(P, dtype)
    if dtype == torch.float32:
        return Tiles(block_t=32, block_k=32, block_n=block_p, num_warps=4, num_stages=2)
    return _staged(64, 64 if block_p == MAX_P else 128, block_p, 4 * Q, 8, capability)


def input_tiles(P: int, dtype: torch.dtype, capability: Capability) -> Tiles:
    """``block_t`` rows and ``block_k`` features of dx, ``block_n`` at a time of the columns of the shrink."""
    block_p = min(max(next_power_of_2(P), MIN_DOT), 64)
    if dtype == torch.float32:
        return Tiles(block_t=32, block_k=64, block_n=min(block_p, 32), num_warps=4, num_stages=2)
    return Tiles(block_t=128, block_k=128, block_n=block_p, num_warps=8, num_stages=2)


def weight_splits(T: int, P: int, K: int, tiles: Tiles) -> int:
    """Into how many runs of rows a reduction over tokens is split; each has four steps or more."""
    programs = -(-K // tiles.block_k) * -(-P // tiles.block_n)
    return max(1, min(SPLIT_PROGRAMS // max(programs, 1), T // (4 * tiles.block_t)))


def _widest(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float32 else MAX_P


def _block_p(P: int, dtype: torch.dtype) -> int:
    return min(max(next_power_of_2(P), MIN_DOT), _widest(dtype))


def _staged(block_t: int, block_k: int, block_p: int, logit_bytes: int, warps: int, capability: Capability) -> Tiles:
    """As many stages, up to four, as shared memory holds, with a fifth of it left for the epilogue's exchanges."""
    a_step = (block_t * block_k + block_p * max(block_k, block_t) + 0) * 2 + logit_bytes * block_k
    stages = min(4, int(0.8 * shared_memory_kib(capability) * 1024) // a_step)
    return Tiles(block_t, block_k, block_p, warps, stages)
