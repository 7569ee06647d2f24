"""Matrix products of the portable backend: whose they are, and that both libraries give the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from molora_kernels import cpu, product, workspace

AMD = {"cpu_name": "AMD EPYC 9654", "avx512_f": True}


@pytest.fixture(autouse=True)
def _in_a_call() -> Iterator[None]:
    with workspace.scope():
        yield


def by_onednn(work: Callable[[], object]) -> bool:
    """Whether oneDNN did some of it."""
    with profile() as found:
        work()
    return any("mkldnn" in event.name for event in found.function_events)


def large(dtype: torch.dtype = torch.float32, *, rows: int = 512) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)


@pytest.mark.parametrize(
    ("capabilities", "onednn"),
    [
        (AMD, True),
        (AMD | {"avx512_f": False}, False),
        (AMD | {"cpu_name": "Intel Xeon"}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_it_is_for_amd_with_avx512(
    capabilities: dict[str, object], onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(cpu, "_has_both", lambda: True)
    assert cpu.prefers_onednn() == onednn
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in PyTorch 2.11
    assert not cpu.prefers_onednn()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN here")
def test_large_fp32_products_are_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "prefers_onednn", lambda: True)
    a, b = large()
    assert len(a) * b.numel() == product.LEAST
    assert by_onednn(lambda: product.mm(a, b))
    assert by_onednn(lambda: product.add_mm(a @ b, a, b))
    assert not by_onednn(lambda: product.mm(*large(rows=511)))
    assert not by_onednn(lambda: product.mm(*large(torch.float64)))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not by_onednn(lambda: product.mm(a, b))
    monkeypatch.setattr(product, "prefers_onednn", lambda: False)
    assert not by_onednn(lambda: product.mm(a, b))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 7, 5), (33, 64, 40), (7, 130, 1)])
def test_both_libraries_give_the_same(M: int, K: int, N: int, across: bool, every_product_by_onednn: None) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, plus, bias = (torch.randn(*s, generator=draw) for s in ((M, K), (K, N), (M, N), (N,)))
    wide = torch.full((M, 3 * N), float("nan"))
    if across:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    exact = a.double() @ b.double()
    for found, expected in (
        (product.mm(a, b), exact),
        (product.mm(a, b, bias, lasting=True), exact + bias),
        (product.add_mm(plus.clone(), a, b), exact + plus),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    product.mm_into(wide[:, N : 2 * N], a, b)
    torch.testing.assert_close(wide[:, N : 2 * N].double(), exact, rtol=1e-5, atol=1e-5)
    assert wide[:, :N].isnan().all() and wide[:, 2 * N :].isnan().all()
