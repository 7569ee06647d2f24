"""What matters here of the CPU that the process runs on: asked at the first call, not at import."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_amx() -> bool:
    """Whether it is one of Intel's Xeons with matrix units (from 2023 on). On them products cost half as much in fp32,
    and a tenth in bf16, as on the other CPU that docs/log.md has measurements of, while memory is no faster."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # PyTorch 2.12 and newer
    return bool(capabilities and capabilities().get("amx_tile"))
