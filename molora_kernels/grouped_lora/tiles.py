"""Tiles of the grouped LoRA kernels: pure functions of shape, dtype and compute capability.

Those of sm_90 in bf16 without dropout were chosen by time (``python -m bench tune``, docs/log.md), all others by what
compiles without a spill. Cached, since they are asked at every launch.

Shape letters: T tokens, K wide features (input of shrink, output of expand), P columns of the shrink (or R of one
projection), Q padded columns of the product that are the routers' and ride along; 0 without a router.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from molora_kernels._triton.tiles import PLANES, Capability, Tiles, cdiv, next_power_of_2, shared_memory_kib

MAX_P = 256
"""Widest block of the shrink: its fp32 accumulator fills 64 registers a thread of two warp groups, 128 of one."""
MAX_Q = 16
"""Most logits of a token that ride along: each is four columns of the product."""
MIN_DOT = 16
"""Fewest columns of a tensor-core product."""
FEWEST_PROGRAMS, SPLIT_PROGRAMS, FEW_SPLITS = 128, 256, 5
"""Programs that a reduction over tokens is split into: about two for each core of an H100, but one if that takes more
than a few splits, whose terms have to be written and summed up. Not the number of cores of the GPU at hand, so that
sums do not depend on it."""
EXPERT_PROGRAMS = 512
"""The same for one expert's tokens, of which there are fewer."""

FP32_STAGES = {(8, 0): (3, 1), (8, 6): (2, 1), (8, 9): (2, 1), (9, 0): (3, 3), (10, 0): (3, 3)}
"""Stages of the grouped shrink in fp32, of the fewest columns and of more, that do not spill; two on other GPUs."""
COMPILED = ((32, 0, 0), (96, 0, 0), (128, 1, 4), (256, 2, 4), (256, 1, 4), (256, 2, 8), (128, 1, 16), (64, 1, 16),
            (64, 3, 8), (256, 2, 16), (1024, 0, 0))  # fmt: skip
"""(P, H, E) of the compile matrix: plain LoRA of o and of q/k/v; mixtures of down, of gate/up with a router each and
shared; the most logits that ride along, beside the most columns and fewer; more, which do not; several blocks."""


def padded_experts(heads: int, experts: int) -> tuple[int, int]:
    """(HEADS, E_PAD): powers of two whose product a tensor core takes."""
    heads = next_power_of_2(heads)
    return heads, max(next_power_of_2(experts), MIN_DOT // PLANES // heads)


def padded_logits(Q: int, dtype: torch.dtype) -> int:
    """Columns that a tensor core takes for Q logits of a token: of all planes where they are such."""
    return max(next_power_of_2(Q) * (PLANES if as_planes(Q, dtype) else 1), MIN_DOT)


def as_planes(Q: int, dtype: torch.dtype) -> bool:
    """Whether the fp32 side of routers' products with x, of Q logits a token, is given as bf16 planes: not for fp16,
    whose range is too short for that, nor for fp32, which runs on the fp32 units."""
    return dtype == torch.bfloat16 and next_power_of_2(Q) <= MAX_Q


def rides_along(P: int, Q: int, dtype: torch.dtype) -> bool:
    """Whether routers of Q logits a token are worth fusing: one block holds the whole shrink, so x is read once. In
    fp32, both accumulators would not fit in registers."""
    return as_planes(Q, dtype) and next_power_of_2(P) <= MAX_P


@functools.cache
def shrink_tiles(P: int, Q: int, dtype: torch.dtype, capability: Capability, *, drops: bool = False) -> Tiles:
    """``block_t`` rows, ``block_k`` at a time of the features, ``block_n`` columns of the shrink; with dropout if it
    ``drops``."""
    block_p = _block_p(P, dtype)
    if dtype == torch.float32:
        return Tiles(block_t=32, block_k=32, block_n=block_p, num_warps=4, num_stages=3)
    warps = 8 if block_p > 64 else 4
    if capability == (9, 0):
        block_k = 64 if block_p == MAX_P else 128
        if drops and Q > 32 and block_p > 64:  # spills beside dropout
            block_k //= 2
        stages = min(_stages_90(block_k * (64 + block_p + Q), 0.9), 3 if block_p == MAX_P else 4)
        rows, warps = (128, 8) if drops and block_p == MAX_P else (64, 4)  # beside dropout, 64 rows spill
        return Tiles(rows, block_k, block_p, warps, stages)
    if _reads_shared_memory(capability):
        staged = _staged(64, 64, block_p, 2 * Q, warps, capability)
        return replace(staged, num_stages=min(staged.num_stages, 3))  # a fourth spills beside 64 columns on sm_100
    # Operands pass through registers: a shorter step leaves room for the accumulators.
    return _staged(64, 32, block_p, 2 * Q, warps, capability)


@functools.cache
def weight_tiles(P: int, Q: int, dtype: torch.dtype, capability: Capability) -> Tiles:
    """``block_t`` tokens at a time, ``block_k`` features, ``block_n`` columns of the shrink."""
    block_p = _block_p(P, dtype)
    if dtype == torch.float32:
        return Tiles(block_t=16, block_k=32, block_n=block_p, num_warps=4, num_stages=2)
    if capability == (9, 0):  # programs with the widest block have a core to themselves, others share one
        stages = _stages_90(64 * (128 + block_p + 2 * Q), 0.9 if block_p == MAX_P else 0.5)
        return Tiles(64, 128, block_p, num_warps=8, num_stages=stages)
    if _reads_shared_memory(capability):
        return _staged(64, 64 if block_p == MAX_P else 128, block_p, 4 * Q, 8, capability)
    block_k = 64 if block_p in (MIN_DOT, MAX_P) or Q else 128  # the narrowest spills beside 128 in Triton 3.6
    if dtype == torch.float16 and (Q > MIN_DOT or (Q and block_p == MAX_P)):
        block_k = 32
    staged = _staged(32, block_k, block_p, 4 * Q, 8 if block_k * block_p > 64 * 128 else 4, capability)
    if Q > 32:  # a fourth stage of the most logits spills on sm_80
        return replace(staged, num_stages=min(staged.num_stages, 3))
    if not Q and block_p == MAX_P and capability in ((8, 6), (8, 9)):  # three spill in dB of two projections
        return replace(staged, num_stages=4)
    return staged


@functools.cache
def input_tiles(P: int, dtype: torch.dtype, capability: Capability, *, drops: bool = False) -> Tiles:
    """``block_t`` rows and ``block_k`` features of dx, ``block_n`` at a time of the columns of the shrink."""
    block_p = min(max(next_power_of_2(P), MIN_DOT), 64)
    if dtype == torch.float32:
        return Tiles(block_t=32, block_k=64, block_n=min(block_p, 32), num_warps=4, num_stages=2)
    if capability == (9, 0) and not drops:  # beside dropout, 256 features spill
        return Tiles(block_t=128, block_k=256, block_n=block_p, num_warps=8, num_stages=2)
    if _reads_shared_memory(capability):
        return Tiles(block_t=128, block_k=128, block_n=block_p, num_warps=8, num_stages=2)
    return Tiles(block_t=128, block_k=64, block_n=min(block_p, 32), num_warps=8, num_stages=3)


def weight_splits(T: int, P: int, K: int, tiles: Tiles) -> int:
    """Into how many runs of rows a reduction over tokens is split; each has four steps or more."""
    programs = _programs(P, K, tiles)
    splits = max(min(SPLIT_PROGRAMS // programs, FEW_SPLITS), FEWEST_PROGRAMS // programs)
    return max(1, min(splits, T // (4 * tiles.block_t)))


def expert_splits(T: int, P: int, K: int, tiles: Tiles) -> int:
    """The same where each expert has about T tokens, and all together P columns."""
    return max(1, min(EXPERT_PROGRAMS // _programs(P, K, tiles), T // (4 * tiles.block_t)))


def _programs(P: int, K: int, tiles: Tiles) -> int:
    """Of one run of rows; with P = 0 a router's gradient is alone."""
    return max(1, cdiv(K, tiles.block_k) * max(1, cdiv(P, tiles.block_n)))


def set_rows(dtype: torch.dtype) -> int:
    """Tokens of a tile of the grouped form, the same for all its kernels: each tile has one list of experts."""
    return 32 if dtype == torch.float32 else 64


def block_r(r: int, dtype: torch.dtype) -> int:
    """Columns of one expert that the grouped form takes at a time."""
    return min(max(next_power_of_2(r), MIN_DOT), _most_columns(dtype))


def slots_of(r: int, k: int, dtype: torch.dtype) -> int:
    """Experts of a tile's list that the grouped form computes side by side: those of one set, if not too wide."""
    return min(next_power_of_2(k), _most_columns(dtype) // block_r(r, dtype))


def _most_columns(dtype: torch.dtype) -> int:
    """Products of fp32 run on the fp32 units, with operands in registers: 64 columns spill on sm_90."""
    return 32 if dtype == torch.float32 else 128


@functools.cache
def set_shrink_tiles(r: int, k: int, dtype: torch.dtype, capability: Capability) -> Tiles:
    """``block_t`` sorted rows, ``block_k`` of the features at a time, ``block_n`` columns of the experts."""
    columns = slots_of(r, k, dtype) * block_r(r, dtype)
    if dtype == torch.float32:
        narrow, wide = FP32_STAGES.get(capability or (0, 0), (2, 2))
        return Tiles(set_rows(dtype), 16, columns, num_warps=4, num_stages=narrow if columns <= MIN_DOT else wide)
    warps = 8 if columns > 64 else 4
    if capability is not None and capability[0] == 9:
        block_k, warps = (128, 8) if columns <= 64 else (64, warps)
        return _staged(set_rows(dtype), block_k, columns, 0, warps, capability)
    staged = _staged(set_rows(dtype), 32, columns, 0, warps, capability)
    # A fourth stage spills beside dropout, and so do steps of 64 on sm_100 with any number of stages.
    return replace(staged, num_stages=min(staged.num_stages, 3))


@functools.cache
def set_expand_tiles(r: int, k: int, dtype: torch.dtype, capability: Capability) -> Tiles:
    """``block_t`` sorted rows, ``block_n`` columns of the output, ``block_k`` columns of the experts at a time."""
    columns = slots_of(r, k, dtype) * block_r(r, dtype)
    if dtype == torch.float32:
        warps = 8 if capability is not None and capability[0] == 10 else 4  # each spills on the other's GPUs
        return Tiles(set_rows(dtype), block_k=columns, block_n=64, num_warps=warps, num_stages=2)
    block_n, stages = (128, 1 if capability == (9, 0) else 2) if _reads_shared_memory(capability) else (64, 2)
    warps = 8 if columns > 64 else 4
    return Tiles(set_rows(dtype), block_k=columns, block_n=block_n, num_warps=warps, num_stages=stages)


@functools.cache
def expert_weight_tiles(r: int, dtype: torch.dtype, capability: Capability) -> Tiles:
    """``block_t`` tokens of an expert at a time, ``block_k`` features, ``block_n`` columns of the expert."""
    tile = weight_tiles(block_r(r, dtype), 0, dtype, capability)
    # Four warps spill on sm_100 in fp32.
    return replace(tile, num_warps=8) if dtype == torch.float32 and capability == (10, 0) else tile


def _block_p(P: int, dtype: torch.dtype) -> int:
    return min(max(next_power_of_2(P), MIN_DOT), 64 if dtype == torch.float32 else MAX_P)


def _reads_shared_memory(capability: Capability) -> bool:
    """Whether tensor cores take their operands from shared memory: wgmma of sm_90, tcgen05 of sm_100."""
    return capability is not None and capability[0] in (9, 10)


def _stages_90(elements: int, share: float) -> int:
    """Up to four stages of so many 16-bit elements in a share of an H100's shared memory."""
    return max(1, min(int(share * shared_memory_kib((9, 0)) * 1024) // (2 * elements), 4))


def _staged(block_t: int, block_k: int, block_p: int, logit_bytes: int, warps: int, capability: Capability) -> Tiles:
    """As many stages, up to four, as shared memory holds, with a fifth of it left for the epilogue's exchanges."""
    step = (block_t * block_k + block_p * max(block_k, block_t)) * 2 + logit_bytes * block_k
    stages = int(0.8 * shared_memory_kib(capability) * 1024) // step + (not _reads_shared_memory(capability))
    return Tiles(block_t, block_k, block_p, warps, min(stages, 4))
