"""What matters here of the CPU that the process runs on: asked at the first call, not at import."""

from __future__ import annotations

import functools

import torch


def has_amx() -> bool:
    """Whether it is one of Intel's Xeons with matrix units (from 2023 on). There products cost half in fp32, and
    a fifth in bf16, as on the other CPU that docs/log.md has measurements of, while memory is no faster. PyTorch 2.11
    cannot say: with it every CPU counts as having none."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # keeps its answer
    return bool(capabilities and capabilities().get("amx_tile"))


def prefers_onednn() -> bool:
    """Whether oneDNN's fp32 products are faster here than MKL's, PyTorch's own choice: on AMD's CPUs with AVX512. With
    PyTorch 2.11, which cannot say what CPU it is, MKL's are taken."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    found = capabilities() if capabilities else {}
    return str(found.get("cpu_name", "")).startswith("AMD") and bool(found.get("avx512_f")) and _has_both()


@functools.cache
def _has_both() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


# What torch.compiler.assume_constant_result does, which imports all of torch.compile for it: a second at each import.
has_amx._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
