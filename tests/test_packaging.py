"""What is installed is what is in the repository: presets by name from anywhere, and a wheel that has everything."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from molora import config
from molora.errors import UserError

ROOT = Path(__file__).parents[1]
PRESET = "configs/presets/reasoning/llama3.2_3b_mixture_lora_sft.yml"


@pytest.mark.parametrize("name", [PRESET, "reasoning/llama3.2_3b_mixture_lora_sft", "llama3.2_3b_mixture_lora_sft.yml"])
def test_presets_are_found_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.find_preset(name) == ROOT / PRESET
    assert config.load(name) == config.load(ROOT / PRESET)


def test_a_file_comes_before_a_preset_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stage1_general").write_text("seed: 7\n")
    assert config.load("stage1_general").seed == 7


def test_an_unknown_preset_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"nothing\.yml: no such file; .* stage2_maths, llama3\.2_3b"):
        config.load("nothing.yml")


@pytest.mark.slow
def test_the_wheel_has_every_module_and_preset(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("molora", "molora_kernels", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    modules = {str(path.relative_to(tree)) for path in tree.glob("molora*/**/*.py")}
    folder = tree / "configs/presets"
    presets = {f"molora/presets/{path.relative_to(folder)}" for path in folder.rglob("*.yml")}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*command, str(tree)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    found = set(zipfile.ZipFile(wheel).namelist())
    assert modules and presets
    assert modules | presets | {"molora/py.typed", "molora_kernels/py.typed"} <= found
