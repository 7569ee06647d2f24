"""Tensors added up, joined and split into planes: exact, so compared bit for bit."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")
total = importlib.import_module("molora_kernels._triton.total")


@pytest.mark.usefixtures("poisoned")
def test_planes_add_up_to_every_bit(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-20, 20, (37, 1), generator=draw)
    x = (torch.randn(37, 45, generator=draw) * scales).to(device)
    (made,) = total.joined([[x]], [total.AS_PLANES])
    assert made.dtype == torch.bfloat16 and made.shape == (3, 37, 45)
    assert torch.equal(made.double().sum(0), x.double())
    assert (made[0].double() - x.double()).abs().max() > 0  # one plane alone would not do
    both, one, none = total.joined([[x[:5], x[30:]], [x[7:8]], [x[:0]]], [total.AS_PLANES] * 3)
    assert torch.equal(both, torch.cat([made[:, :5], made[:, 30:]], 1)) and torch.equal(one, made[:, 7:8])
    assert none.shape == (3, 0, 45)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_terms_add_up_in_their_order(dtype: torch.dtype, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    terms, more = torch.randn(5, 6, 250, generator=draw).to(device), torch.randn(1, 9, 1100, generator=draw).to(device)
    in_order = torch.zeros(6, 250, device=device)
    for term in terms:
        in_order = in_order + term
    whole, alone = total.totals([[terms], [more]], [dtype, torch.float32])
    assert torch.equal(whole, in_order.to(dtype)) and torch.equal(alone, more[0])
    halves = total.totals([[part] for part in terms.chunk(2, 1)], [dtype] * 2)  # of several projections, in one
    assert all(torch.equal(*pair) for pair in zip(halves, whole.chunk(2), strict=True))
    (stacked,) = total.totals([[terms[:, 3:], terms[:2, :3]]], [dtype])
    assert torch.equal(stacked, torch.cat([whole[3:], (terms[0] + terms[1])[:3].to(dtype)]))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_are_joined_in_another_dtype(dtype: torch.dtype, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(rows, 70, generator=draw).to(device) for rows in (5, 16, 3))
    c = c.to(dtype)
    kinds = [dtype, dtype, torch.float32, dtype, total.AS_PLANES]
    found = total.joined([[a, b.T.contiguous().T], [c], [a[0], b[1]], [c[:, ::2]], [a[:, ::2]]], kinds)
    assert torch.equal(found[0], torch.cat([a, b]).to(dtype)) and torch.equal(found[2], torch.cat([a[0], b[1]]))
    assert found[1] is c and torch.equal(found[3], c[:, ::2]) and all(t.is_contiguous() for t in found)
    assert torch.equal(found[4].double().sum(0), a[:, ::2].double())
