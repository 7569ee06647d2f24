"""``bench tune`` without a GPU: each operation runs, with each kind of candidate in place, and gives the same."""

from __future__ import annotations

import importlib

import pytest
import torch

from bench import tune

pytest.importorskip("triton")
SMALL = tune.Shape(tokens=70, hidden=64, intermediate=128, rank=4, dtype="bf16")


@pytest.mark.parametrize("name", tune.TARGETS)
def test_a_candidate_takes_the_place_and_leaves_it(name: str) -> None:
    target = tune.TARGETS[name]
    candidates = list(target.candidates())
    assert len({tune._said(candidate) for candidate in candidates}) == len(candidates) > 5
    places = [path.split(":") for path in candidates[-1]]
    before = [getattr(importlib.import_module(module), attribute) for module, attribute in places]
    expected = target.prepare(SMALL)()
    with tune._replaced(candidates[-1]):
        changed = [getattr(importlib.import_module(module), attribute) for module, attribute in places]
        found = target.prepare(SMALL)()
    after = [getattr(importlib.import_module(module), attribute) for module, attribute in places]
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert any(old is not new for old, new in zip(before, changed, strict=True))
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", tune.TARGETS)
def test_every_knob_turns_something(name: str) -> None:
    """A knob that the operation never reads may as well hold nothing."""
    candidate = next(tune.TARGETS[name].candidates())
    turned = [path for path in candidate if _fails_without(name, path)]
    # Gates and elementwise kernels have one list for forward and backward: each has knobs of the other.
    assert turned if name in ("gate", "gate backward", "swiglu", "swiglu backward") else turned == list(candidate)


def _fails_without(name: str, path: str) -> bool:
    try:
        with tune._replaced({path: None}):
            tune.TARGETS[name].prepare(SMALL)()
    except (TypeError, AttributeError):
        return True
    return False


def test_what_cannot_run_is_a_finding() -> None:
    said = tune._compiled("shrink o", SMALL, {f"{tune.TILES}:shrink_tiles": None})
    assert said.startswith("AttributeError")
