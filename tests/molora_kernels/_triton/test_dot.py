"""The terms into which fp32 operands are split lose nothing."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from molora_kernels._triton.dot import bf16_terms, tf32_terms  # noqa: E402


@triton.jit
def terms_kernel(p_x, p_terms, N: tl.constexpr, BF16: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(p_x + o)
    if BF16:
        b_high, b_middle, b_low = bf16_terms(b_x)
    else:
        b_high, b_middle, b_low = tf32_terms(b_x)
    tl.store(p_terms + o, b_high.to(tl.float32))
    tl.store(p_terms + N + o, b_middle.to(tl.float32))
    tl.store(p_terms + 2 * N + o, b_low.to(tl.float32))


@pytest.mark.parametrize("bf16", [True, False])
def test_terms_add_up_exactly(bf16: bool, device: torch.device) -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 1024)
    x = torch.cat([x[:-2], torch.tensor([0.0, -1.0])]).to(device)
    terms = torch.full((3, 1024), float("nan"), device=device)
    terms_kernel[(1,)](x, terms, N=1024, BF16=bf16)
    assert torch.equal(terms.double().sum(0), x.double())
    if bf16:
        assert torch.equal(terms.bfloat16().float(), terms)
    else:  # tf32 keeps the upper 10 bits of the mantissa
        assert not (terms.view(torch.int32) & 0x1FFF).any()
