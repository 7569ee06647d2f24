"""fp32 as bf16 planes, and sums of terms: exact, so compared bit for bit."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")
planes = importlib.import_module("molora_kernels._triton.planes").planes
total = importlib.import_module("molora_kernels._triton.total").total


@pytest.mark.usefixtures("poisoned")
def test_planes_add_up_to_every_bit(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-20, 20, (37, 1), generator=draw)
    x = (torch.randn(37, 45, generator=draw) * scales).to(device)
    made = planes(x)
    assert made.dtype == torch.bfloat16 and made.shape == (3, 37, 45)
    assert torch.equal(made.double().sum(0), x.double())
    assert (made[0].double() - x.double()).abs().max() > 0  # one plane alone would not do
    assert planes(x[:0]).shape == (3, 0, 45)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_terms_add_up_in_their_order(dtype: torch.dtype, device: torch.device) -> None:
    terms = torch.randn(5, 6, 250, generator=torch.Generator().manual_seed(0)).to(device)
    in_order = torch.zeros(6, 250, device=device)
    for term in terms:
        in_order = in_order + term
    assert torch.equal(total(terms, dtype), in_order.to(dtype))
    for part, expected in zip(terms.chunk(2, 1), in_order.chunk(2), strict=True):  # of several projections, in one
        assert torch.equal(total(part, dtype), expected.to(dtype))
    assert torch.equal(total(terms[:1], dtype), terms[0].to(dtype))
