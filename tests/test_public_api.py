"""What the packages export, and that every public function is documented."""

from __future__ import annotations

import inspect

import pytest

import molora
import molora_kernels
from molora_kernels.backend import compiler_installed


def test_molora_exports() -> None:
    assert set(molora.__all__) == {
        "Config", "Injection", "MoE", "UserError", "inject", "load", "parameter_groups", "remove", "save_adapter",
    }  # fmt: skip


def test_kernel_exports() -> None:
    assert {"router", "grouped_lora", "mlp_block", "use_backend", "dropout_mask"} <= set(molora_kernels.__all__)


@pytest.mark.parametrize("module", [molora, molora_kernels])
def test_everything_public_has_a_docstring(module) -> None:
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name


@pytest.mark.parametrize("name", ["router", "grouped_lora", "mlp_block", "dropout_mask"])
def test_kernel_docstrings_say_what_goes_in_what_comes_out_and_what_is_refused(name: str) -> None:
    text = inspect.getdoc(getattr(molora_kernels, name)) or ""
    assert all(part in text for part in ("Args:", "Returns:", "Raises:"))


def test_backend_choice_is_checked_and_undone() -> None:
    import torch

    cpu = torch.device("cpu")
    with molora_kernels.use_backend("reference"):
        assert molora_kernels.backend_for(cpu) == "reference"
    with molora_kernels.use_backend("auto"):
        assert molora_kernels.backend_for(cpu) == ("inductor" if compiler_installed() else "torch")
    undone = molora_kernels.use_backend("reference")
    with molora_kernels.use_backend("torch"):
        assert molora_kernels.backend_for(cpu) == "torch"
    with undone:
        assert molora_kernels.backend_for(cpu) == "reference"
    with pytest.raises(ValueError, match="choose one of"):
        molora_kernels.use_backend("cuda")  # type: ignore[arg-type]
