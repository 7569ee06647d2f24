"""Triton's interpreter with its bf16 rounding mended.

numpy has no bf16, and the interpreter's cast from fp32 truncates where the GPU rounds to nearest even: twice the error,
and biased. (Its product of bf16 operands is wrong too; ``_triton/dot.py`` widens them there.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend_bf16() -> None:
    """Replace the interpreter's fp32 -> bf16 cast; once per process is enough."""
    convert = interpreter._convert_float
    if hasattr(convert, "mended"):
        return

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return round_to_bf16(data)
        return convert(data, source, target, rounding)

    convert_float.mended = True
    interpreter._convert_float = convert_float


def round_to_bf16(data: np.ndarray) -> np.ndarray:
    """fp32 to the nearest bf16, ties to even, as uint16."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
