"""The sanitizer, which watches all tests of kernels (``conftest.py``), finds what is planted."""

from __future__ import annotations

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU compute-sanitizer does this (bench/gpu.sh sanitize)", allow_module_level=True)
tl = importlib.import_module("triton.language")
from sanitizer import Fault, watching  # noqa: E402 # which needs Triton


@triton.jit
def copy_kernel(p_x, p_y, n, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """y = x, each program BLOCK elements of it, AHEAD more than are its own."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK + AHEAD)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def shift_kernel(p_x, n, BLOCK: tl.constexpr):
    """x[i] = x[i + 1], in place."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o + 1, mask=o + 1 < n, other=0.0), mask=o < n)


@triton.jit
def echo_kernel(p_x, p_y, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """y is a copy of what was just written to x, the other way round."""
    o = tl.arange(0, BLOCK)
    tl.store(p_x + o, o.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_y + o, tl.load(p_x + BLOCK - 1 - o))


@triton.jit
def pile_kernel(p_x, BLOCK: tl.constexpr, SAME: tl.constexpr):
    """Every lane writes the first element."""
    o = tl.arange(0, BLOCK)
    tl.store(p_x + o * 0, (o * 0 if SAME else o).to(tl.float32))


def test_what_is_right_passes() -> None:
    x, y = torch.arange(10.0), torch.zeros(10)
    with watching() as launched:
        copy_kernel[(3,)](x, y, 10, BLOCK=4, AHEAD=0)
        echo_kernel[(1,)](x, y, BLOCK=8, BARRIER=True)
        pile_kernel[(1,)](x, BLOCK=8, SAME=True)
        shift_kernel[(1,)](x, 10, BLOCK=16)  # one program: it has read all before it writes
    assert launched == ["copy_kernel", "echo_kernel", "pile_kernel", "shift_kernel"]


def test_what_lies_outside_is_found() -> None:
    whole = torch.zeros(64)
    x, y = whole[:10], torch.zeros(16)
    with watching(), pytest.raises(Fault, match=r"copy_kernel, program 2: reads outside of its tensors: \+10 elements"):
        copy_kernel[(3,)](x, y, 12, BLOCK=4, AHEAD=0)
    with watching(), pytest.raises(Fault, match="program 2: writes outside"):
        copy_kernel[(3,)](y, x, 12, BLOCK=4, AHEAD=0)
    with watching(), pytest.raises(Fault, match=r"reads outside of its tensors: .* strides"):
        copy_kernel[(3,)](whole.view(8, 8)[:, :4], y, 12, BLOCK=4, AHEAD=0)  # what lies between the rows of a view


def test_races_are_found() -> None:
    with watching(), pytest.raises(Fault, match="is written by programs 0 and 1"):
        copy_kernel[(3,)](torch.zeros(16), torch.zeros(16), 16, BLOCK=4, AHEAD=4)
    with watching(), pytest.raises(Fault, match="is written by program 1 and read by program 0"):
        shift_kernel[(2,)](torch.zeros(16), 16, BLOCK=8)
    with watching(), pytest.raises(Fault, match="reads what it has written, with no barrier between"):
        echo_kernel[(1,)](torch.zeros(8), torch.zeros(8), BLOCK=8, BARRIER=False)
    with watching(), pytest.raises(Fault, match="puts different values in one place"):
        pile_kernel[(1,)](torch.zeros(8), BLOCK=8, SAME=False)
