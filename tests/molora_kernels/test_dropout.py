"""Dropout masks: the bits of their definition, and their statistics. In kernels: ``_triton/test_dropout_kernel.py``."""

from __future__ import annotations

import pytest
import torch

from molora_kernels import dropout_mask, use_backend, workspace
from molora_kernels.backend import Backend
from molora_kernels.dropout import GOLDEN, MULTIPLIERS, Dropout, survivor_scale, threshold

SEEDS = [0, 1, -1, 2**62 + 12345, -(2**63)]


def word(seed: int, row: int, pair: int, stream: int) -> int:
    """The definition, in Python's unbounded integers."""
    wrap = (1 << 32) - 1

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * MULTIPLIERS[0] & wrap
        x ^= x >> 15
        x = x * MULTIPLIERS[1] & wrap
        return x ^ x >> 16

    high = (seed >> 32) + stream * GOLDEN & wrap
    key = mix(mix(row ^ seed & wrap) + high & wrap)
    return mix(key + pair * GOLDEN & wrap)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_its_definition(p: float, seed: int) -> None:
    mask = dropout_mask(torch.tensor(seed), 5, 7, p, stream=3)
    for row in range(5):
        for column in range(7):
            half = word(seed, row, column // 2, 3) >> 16 * (column % 2) & 0xFFFF
            assert mask[row, column].item() == (half >= threshold(p))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_kept_fraction_and_independence(p: float) -> None:
    n = 1 << 20
    a, b, c = (dropout_mask(torch.tensor(s), 1024, 1024, p, t).float() for s, t in ((7, 0), (7, 1), (8, 0)))
    sigma = (p * (1 - p) / n) ** 0.5
    for mask in (a, b, c):
        assert abs(mask.mean().item() - (1 - p)) < 5 * sigma + 1 / 65536
    # Correlations of n samples have standard deviation 1/sqrt(n): between streams, seeds, rows and columns.
    for left, right in ((a, b), (a, c), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a, a.T)):
        correlation = torch.corrcoef(torch.stack([left.reshape(-1), right.reshape(-1)]))[0, 1].item()
        assert abs(correlation) < 5 / n**0.5


def test_expectation_is_exact_for_the_rounded_p() -> None:
    for p in (0.0, 0.05, 1 / 3, 0.5, 0.999):
        assert survivor_scale(p) * (1 - threshold(p) / 65536) == pytest.approx(1.0, abs=1e-12)


def test_no_dropout_keeps_everything_and_bad_p_raises() -> None:
    assert dropout_mask(torch.tensor(1), 3, 5, 0.0).all()
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout p"):
            dropout_mask(torch.tensor(1), 3, 5, p)


@pytest.mark.parametrize("backend", ["torch", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [6, 7])
def test_dropped_is_the_mask_of_each_token(
    columns: int, dtype: torch.dtype, backend: Backend, every_pass_compiled: None
) -> None:
    seed, x = torch.tensor(-(2**40) + 5), torch.randn(50, columns).to(dtype)
    kept, tokens = dropout_mask(seed, 50, columns, 0.3, stream=1), torch.randperm(50)
    assert 0 < kept.sum() < kept.numel()
    dropout = Dropout(seed, 0.3, stream=1)
    with use_backend(backend), workspace.scope():
        before = x.clone()
        assert torch.equal(dropout.dropped(x), x * kept) and torch.equal(x, before)
        assert torch.equal(dropout.dropped(x[tokens], tokens), (x * kept)[tokens])
        assert torch.equal(dropout.drop_(x), before * kept) and torch.equal(x, before * kept)
        assert dropout._replace(p=0.0).dropped(x) is x
