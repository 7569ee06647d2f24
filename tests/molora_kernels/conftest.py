"""What every kernel test needs: a device, and memory whose old content would be noticed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from molora_kernels import backend, one_pass


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN (integers: a large value), so that an element that no kernel writes shows."""

    def fill(t: torch.Tensor) -> torch.Tensor:
        if t.is_floating_point():
            return t.fill_(float("nan"))
        return t if t.dtype == torch.bool else t.fill_(torch.iinfo(t.dtype).max // 3)

    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _original=original, **k: fill(_original(*a, **k)))
    for name in ("new_empty", "new_empty_strided"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, _original=original, **k: fill(_original(*a, **k)))
    yield


@pytest.fixture
def every_pass_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The inductor backend compiles passes over few rows too."""
    if not backend.compiler_installed():
        pytest.skip("there is no C++ compiler here")
    monkeypatch.setattr(one_pass, "LEAST_ELEMENTS", 1)
    with torch._dynamo.config.patch(recompile_limit=64):  # cases have more layouts than a run
        yield


@pytest.fixture(autouse=True, scope="session")
def _rounded_bf16() -> None:
    """The interpreter truncates to bf16 where a GPU rounds; it is mended for these tests."""
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        from interpreter import mend_bf16

        mend_bf16()


@pytest.fixture(autouse=True)
def _sanitized() -> Iterator[None]:
    """Every launch in the interpreter is watched: what it reads and writes, and who else does."""
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        yield
        return
    from sanitizer import watching

    with watching():
        yield
