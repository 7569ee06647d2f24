"""What matters here of the CPU that the process runs on: asked at the first call, not at import."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def has_amx() -> bool:
    """Whether it is one of Intel's Xeons with matrix units (from 2023 on). On those products cost half as much in fp32,
    and a tenth in bf16, as on the other CPU that docs/log.md has measurements of, while memory is no faster."""
    # PyTorch keeps the answer; a cache of our own torch.compile would look through, and fail.
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # PyTorch 2.12 and newer
    return bool(capabilities and capabilities().get("amx_tile"))
