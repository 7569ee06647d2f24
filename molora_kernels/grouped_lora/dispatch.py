"""Which form of the expert computation runs: every expert on every token, or the chosen ones on tokens sorted by them.

- ``dense``: the E experts of a projection are one LoRA of rank E * r whose intermediate the gates mask. No token moves,
  and E / k times the necessary products are computed.
- ``grouped``: tokens are sorted by the experts they chose and only those are computed. Rows are gathered and scattered.
- ``auto``: :func:`choose_form` decides, from shapes alone.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from molora_kernels import backend
from molora_kernels.cpu import has_amx
from molora_kernels.grouped_lora import order

Form = Literal["auto", "dense", "grouped"]
Resolved = Literal["dense", "grouped"]

_choice: Form = "auto"

RIDGE = {80: 156, 86: 76, 89: 164, 90: 295, 100: 281, 120: 117}
"""FLOP per byte of memory traffic at which 16-bit products and memory take equally long, from data sheets (A100, 3090,
4090, H100, B200, 5090)."""


COMPILED_TOKENS = 256
"""From which the grouped form's C++ kernels are ahead of the matrix library's products of all experts, in bf16."""
CPU_RIDGE = {False: {4: 56, 2: 100}, True: {4: 100, 2: 600}}
"""Rank left out per visit of a row from which moving the row pays, measured on a CPU without and with matrix units
(AMX), for elements of 4 and of 2 bytes. The faster the products, the more must be spared; and for matrix units oneDNN
compiles 16-bit products, in a millisecond, for each number of rows that it has not met lately."""
CPU_ROWS = 256
"""Rows that a group has on average from which its products run at full speed; with fewer, more has to be spared."""
CPU_FEATURES = {4: 384, 2: 512}
"""Features of x, of elements of 4 and of 2 bytes, from which, without matrix units, a block's products take so long
that what each group costs besides does not show."""


class use_form:
    """Choose the form of routed experts for all calls from here on, or for a ``with`` block.

    >>> with use_form("grouped"):
    ...     form_for(torch.zeros(8, 64), experts=4, top_k=2, rank=8)
    'grouped'

    A backward runs the form of its forward. Where there is nothing to choose (no gates, ``top_k`` not given, all
    experts chosen, no tokens) the form is dense. Raises ``ValueError`` for an unknown name.
    """

    def __init__(self, name: Form) -> None:
        global _choice
        if name not in get_args(Form):
            raise ValueError(f"unknown form {name!r}: choose one of {', '.join(get_args(Form))}")
        self._name: Form = name
        self._previous: Form = _choice
        _choice = name

    def __enter__(self) -> use_form:
        global _choice
        _choice = self._name
        return self

    def __exit__(self, *_: object) -> None:
        global _choice
        _choice = self._previous


def form_for(x: Tensor, experts: int, top_k: int | None, rank: int) -> Resolved:
    """The form that flat tokens ``x`` (T, K) take under the present choice; ``rank`` is one expert's."""
    if top_k is None or top_k >= experts or not x.shape[0]:
        return "dense"
    if _choice != "auto":
        return _choice
    capability, amx, compiled = None, x.device.type == "cpu" and has_amx(), backend.compiles(x.device.type)
    if x.device.type == "cuda":
        properties = torch.cuda.get_device_properties(x.device)  # which, unlike the capability, torch.compile can trace
        capability = (properties.major, properties.minor)
    tokens, features = x.shape
    return choose_form(tokens, features, experts, top_k, rank, x.dtype, x.device.type, capability, amx, compiled)


def choose_form(
    tokens: int,
    features: int,
    experts: int,
    top_k: int,
    rank: int,
    dtype: torch.dtype,
    device_type: str,
    capability: tuple[int, int] | None = None,
    amx: bool = False,
    compiled: bool = False,
) -> Resolved:
    """The faster form, forward and backward together, for ``features`` of x. Both cost in proportion to the features,
    so these do not count, but for narrow rows on a CPU without matrix units.

    CUDA, a model, right at 4 and 8 experts of rank 32 on an H200 and not measured beyond: dense computes
    ``6 (E - k) r`` FLOPs per token and feature too many, grouped moves about ``6 k`` elements of 16 bits per token and
    feature more. They are equal at ``(E - k) r = k * ridge``.

    CPU, measured (docs/adr/0004-dense-experts.md): the same balance, with rows moved once where tokens are
    sorted by set and k times where by expert; short groups and narrow rows count as if there were more to move. In
    fp32 and bf16, ``compiled`` to C++ and without matrix units, no row moves: in fp32 grouped takes 0.4 to 1.0 of dense
    (1.08 at worst, of 16 tokens), in bf16 0.45 to 1.03, and more only of few tokens; on x86, not measured on Arm.
    """
    if top_k >= experts:
        return "dense"
    if device_type == "cuda":
        major, minor = capability or (0, 0)
        ridge = RIDGE.get(10 * major + minor, RIDGE[90])  # unknown GPUs: the largest, so dense, which moves no tokens
        return "grouped" if (experts - top_k) * rank > top_k * ridge else "dense"
    in_cpp = compiled and experts <= order.MOST_EXPERTS and dtype in (torch.float32, torch.bfloat16)
    if device_type == "cpu" and in_cpp and not amx:
        least = 1 if dtype == torch.float32 else COMPILED_TOKENS
        return "grouped" if tokens >= least else "dense"
    if device_type == "cpu":
        by_set = order.sorted_by_set(experts, top_k)
        visits, groups = (1, math.comb(experts, top_k)) if by_set else (top_k, experts)
        size = 2 if dtype.itemsize == 2 else 4
        moved = max(tokens * visits, CPU_ROWS * groups)
        if not amx:
            moved *= max(1.0, CPU_FEATURES[size] / max(features, 1))
        return "grouped" if (experts - top_k) * rank * tokens > CPU_RIDGE[amx][size] * moved else "dense"
    return "dense"
