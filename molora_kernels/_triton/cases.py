"""What the compile matrix compiles: one launch of one kernel, described well enough to be compiled without a GPU.

Each op's ``forward.py`` and ``backward.py`` has

    def compile_cases(capability: Capability) -> Iterator[Case]

which yields every (kernel, tiles, dtype) that its launchers can use on such a GPU; ``bench/registry.py`` lists those
modules. To keep the description next to the truth, call the same selector as the launcher does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from molora_kernels._triton.tiles import Tiles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels take x in."""


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel."""

    kernel: Any
    """The ``@triton.jit`` function."""
    label: str
    """What tells it apart from the kernel's other cases: "bf16 H=2 E=4"."""
    pointers: Mapping[str, torch.dtype | tuple[torch.dtype, ...]]
    """Tensor arguments, or tuples of them; taken to be 16-byte aligned, as PyTorch allocates them."""
    scalars: Mapping[str, float | tuple[int, ...]]
    """Run-time numbers with the value of a typical launch: 1 becomes a constant, multiples of 16 are marked."""
    constants: Mapping[str, Any]
    """constexpr arguments, and None for tensors that are absent."""
    tiles: Tiles
    tensor_cores: bool
    """Whether its code has to contain a tensor-core instruction."""


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def distinct(cases: Iterable[Case]) -> list[Case]:
    """Cases in order, without those whose kernel, arguments and tiles were there before."""
    seen: dict[str, Case] = {}
    for case in cases:
        key = repr((case.kernel.__name__, case.pointers, case.scalars, case.constants, case.tiles))
        seen.setdefault(key, case)
    return list(seen.values())
