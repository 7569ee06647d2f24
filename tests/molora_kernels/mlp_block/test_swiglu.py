"""SwiGLU's C++ kernels: their definition in fp64, at sizes that are no whole vectors, and numbers at fp32's ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from molora_kernels import backend, use_backend
from molora_kernels.mlp_block import cpp

pytestmark = pytest.mark.skipif(not backend.compiler_installed(), reason="there is no C++ compiler here")

ROUNDINGS = {torch.float32: 6, torch.bfloat16: 0.51}
"""Of a result: two of e^x, and one of a sum, a quotient and two products; in bf16 all but the last are fp32's."""


@pytest.fixture(autouse=True)
def _inductor() -> Iterator[None]:
    with use_backend("inductor"):
        yield


def near(actual: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    allowed = ROUNDINGS[actual.dtype] * torch.finfo(actual.dtype).eps * magnitude + torch.finfo(actual.dtype).tiny
    assert ((actual.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 16), (129, 65), (0, 4)], ids=str)
def test_forward_and_backward_are_their_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up, dh = ((4 * torch.randn(shape)).to(dtype) for _ in range(3))
    h, again, dup, dgate = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate), dh.clone()
    cpp.swiglu(gate, up, h)
    cpp.swiglu_backward_(dgate, gate, up, again, dup)
    g, u, d = (t.double() for t in (gate, up, dh))
    share = torch.sigmoid(g)
    near(h, F.silu(g) * u, (F.silu(g) * u).abs())
    near(dup, F.silu(g) * d, (F.silu(g) * d).abs())
    # 1 + g (1 - share) is a sum of numbers of both signs.
    near(dgate, d * u * share * (1 + g * (1 - share)), (d * u * share * (1 + g.abs() * (1 - share))).abs())
    assert torch.equal(again, h)


def test_numbers_at_the_ends() -> None:
    inf = float("inf")
    gate = torch.tensor([float("nan"), inf, 3e38, 89.0, 88.0, -87.0, -88.5, -90.0, -1e30, -3e38, 0.0, -0.0])
    h = torch.empty_like(gate)
    cpp.swiglu(gate, torch.ones_like(gate), h)
    torch.testing.assert_close(h, F.silu(gate), rtol=1e-6, atol=1e-35, equal_nan=True)


def test_what_it_does_not_serve() -> None:
    x = torch.zeros(512, 512)
    assert cpp.serves(x, x) and not cpp.serves(x, x.T) and not cpp.serves(x.double(), x.double())
    assert not cpp.serves(x[:511], x[:511])  # too few to pay
    with use_backend("torch"):
        assert not cpp.serves(x, x)
