"""What matters here of the CPU that the process runs on: asked at the first call, not at import."""

from __future__ import annotations

import torch


def has_bf16_pairs() -> bool:
    """Whether it multiplies pairs of bf16 at once (AVX512-BF16). With PyTorch 2.11 this says no: see has_amx."""
    return _has("avx512_bf16")


def has_amx() -> bool:
    """Whether it is one of Intel's Xeons with matrix units (from 2023 on). There products cost half in fp32, and
    a fifth in bf16, as on the other CPU that docs/log.md has measurements of, while memory is no faster. PyTorch 2.11
    cannot say: with it every CPU counts as having none."""
    return _has("amx_tile")


def _has(what: str) -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # keeps its answer
    return bool(capabilities and capabilities().get(what))


# What torch.compiler.assume_constant_result does, which imports all of torch.compile for it: a second at each import.
has_amx._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
