"""What the packages export, and that every public function is documented."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import molora
import molora_kernels
from molora import __main__ as listed
from molora_kernels import backend
from molora_kernels.backend import compiler_installed


def test_molora_exports() -> None:
    assert set(molora.__all__) == {
        "Config", "Injection", "MoE", "UserError", "inject", "load", "parameter_groups", "remove", "save_adapter",
    }  # fmt: skip


def test_what_help_shows_runs(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, _ = (molora.__doc__ or "").partition("In Python::")[2].partition("Commands")
    (tmp_path / "meta-llama").mkdir()
    (tmp_path / "meta-llama" / "Llama-3.2-1B").symlink_to(tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(8)[None]
    names = {"torch": torch, "molora": molora, "AutoModelForCausalLM": AutoModelForCausalLM}
    exec(textwrap.dedent(code), {**names, "batch": {"input_ids": ids, "labels": ids}})
    assert (tmp_path / "adapter" / "molora.json").is_file()


def test_the_list_of_commands_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(molora.__file__).parent
    started = [path for path in folder.rglob("*.py") if "\n    cli.run(main)\n" in path.read_text(encoding="utf-8")]
    started += folder.glob("*/__main__.py")
    commands = {(path.parent if path.stem == "__main__" else path).stem for path in started}
    listed.main([])
    assert set(re.findall(r"python -m molora\.([a-z]+) {2,}\w", capsys.readouterr().out)) == commands
    with pytest.raises(SystemExit, match="2"):
        listed.main(["train"])


def test_kernel_exports() -> None:
    assert {"router", "grouped_lora", "mlp_block", "few_tokens", "use_backend", "dropout_mask"} <= set(
        molora_kernels.__all__
    )


@pytest.mark.parametrize("module", [molora, molora_kernels])
def test_everything_public_has_a_docstring(module) -> None:
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name


@pytest.mark.parametrize("name", ["router", "grouped_lora", "mlp_block", "few_tokens", "dropout_mask"])
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


def test_a_gpu_without_the_tensor_cores_that_kernels_use_gets_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_triton_installed", lambda: True)
    for has, expected in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(backend, "_tensor_cores", lambda has=has: has)
        assert backend._auto("cuda")[0] == expected
