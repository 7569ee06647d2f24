"""The error budget lets through what it should, and nothing else."""

from __future__ import annotations

import pytest
import torch

from molora_kernels.testing import assert_within_budget


def test_budget() -> None:
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    eager = (exact + 1e-4).float()
    assert_within_budget((exact - 1.9e-4).float(), eager, exact)
    assert_within_budget(exact.bfloat16(), exact.bfloat16(), exact)
    with pytest.raises(AssertionError, match=r"dx: error 0\.0003.*twice eager's"):
        assert_within_budget((exact + 3e-4).float(), eager, exact, "dx")


def test_budget_refuses_nan_and_other_shapes_and_dtypes() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    eager = exact.float()
    holed = eager.clone()
    holed[1] = float("nan")
    for actual in (holed, eager[:2], exact):
        with pytest.raises(AssertionError):
            assert_within_budget(actual, eager, exact)
    with pytest.raises(AssertionError):  # an eager result that is not a number excuses nothing
        assert_within_budget(eager + 1, holed, exact)
