"""The code in README and docs/ works: the blocks of a page run from top to bottom in one folder, beside a tiny random
model, commands as Python. The few commands that no test can run are listed here with the reason, and are parsed by the
programs they name, so that a misspelt option, key or preset fails in them too."""

from __future__ import annotations

import argparse
import doctest
import importlib.util
import inspect
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import molora
import molora_kernels
from molora import config, quickstart
from molora_kernels import backend
from tests.conftest import make_rows, write_jsonl

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "molora_kernels").rglob("*.md"))]
MODULES = ("molora.", "bench")
SHELL, PYTHON, NOT_CODE = "sh", "python", ("text", "json", "yaml")

NOT_RUN = {
    r"make (venv|quickstart|test)": "minutes; CI runs `make test`, and tests/molora/test_quickstart.py",
    r"(\.venv/bin/)?pip install .*": "would change the environment that the tests run in",
    r"python -m pip wheel .*": "tests/test_packaging.py builds the wheel",
    r"python -m molora\.prepare quickstart": "unpacks a real model; tests/molora/test_prepare.py makes its parts",
    r"python -m molora\.quickstart": "trains a real model; tests/molora/test_quickstart.py runs it on a tiny one",
    r"python -m molora\.prepare (general-en-ko|openr1-math)": "downloads; tests/molora/test_prepare_sets.py has copies",
    r"python -m molora\.prepare openr1-math --source .*": "needs a copy of the set; tests/molora/test_prepare_sets.py",
    r"MODEL=\S+ configs/run_\w+\.sh": "hours; tests/test_configs.py checks each command of the script",
    r"python -m molora\.exercise": "five trainings; tests/molora/test_exercise.py runs it on short ones",
    r"python -m molora\.convert import .*": "needs what EulerForge wrote; tests/molora/test_eulerforge.py",
    r"torchrun --nnodes .*": "needs several machines; the other commands with torchrun run",
}
"""Commands, as patterns of the whole line, and why they are parsed and not run."""

INSTEAD = {"--routing-layer 12": "--routing-layer 1"}
"""The tiny model has two layers."""

SHORTER = {
    r"molora\.train .*llama3\.2_3b": ["--set", "training.max_train_steps=4"],  # instead of hours
    r"molora\.train .*stage[12]_": ["--set", "training.max_train_steps=14", "--set", "data.max_length=96"],
    r"molora\.evaluate ": ["--max-new-tokens", "8"],
}
"""What is added to commands in which such a pattern is found."""

TRAINED = {
    "docs/how-to/routing.md": {f"outputs/quickstart/stage{n}": n for n in (1, 2)},
    "docs/export-and-merge.md": {"adapter": 1},
    "docs/how-to/evaluate.md": {"outputs/stage1/final": 1, "outputs/stage2/final": 2},
}
"""Page -> what it supposes to be trained, and in which stage; where it ends in `final`, the adapter alone."""


class Block(NamedTuple):
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, indented ones too."""
    opened: re.Match[str] | None = None
    start, inside = 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r" *(```+|~~~+)(.*)", line)
        if opened is None and fence:
            opened, start, inside = fence, number, []
        elif opened is not None and fence and fence[1] == opened[1] and not fence[2].strip():
            yield Block(start, opened[2].strip(), inspect.cleandoc("\n".join(inside)))
            opened = None
        else:
            inside.append(line)
    assert opened is None, f"{page}:{start}: a block that does not end"


def commands(block: Block) -> Iterator[str]:
    """The command lines of a shell block, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield " ".join(line.partition(" #")[0].split())


def reason(command: str) -> str | None:
    """Why a command is not run."""
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


def shell_commands() -> list[tuple[str, str]]:
    """(page and line, command) of every page."""
    return [
        (f"{page.relative_to(ROOT)}:{block.line}", command)
        for page in PAGES
        for block in blocks(page)
        if block.language == SHELL
        for command in commands(block)
    ]


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page: Path) -> None:
    known = {SHELL, PYTHON, *NOT_CODE}
    assert not [(block.line, block.language) for block in blocks(page) if block.language not in known]


def test_the_api_page_has_every_public_name_and_every_key() -> None:
    names = re.findall(r"^::: ([\w.]+)", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not importlib.util.find_spec("peft"):
        names = [name for name in names if not name.startswith("molora.peft")]
    shown = [found(name) for name in names]
    public = [getattr(package, name) for package in (molora, molora_kernels) for name in package.__all__]
    sections = [one for one in vars(config).values() if isinstance(one, type) and issubclass(one, config.Section)]
    wanted = [*public, *(one for one in sections if one is not config.Section)]
    assert not [one.__qualname__ for one in wanted if not any(one is other for other in shown)]


def found(name: str) -> Any:
    """What a dotted name stands for; a function before a module of the same name."""
    here, *parts = name.split(".")
    thing: Any = importlib.import_module(here)
    for part in parts:
        here = f"{here}.{part}"
        thing = getattr(thing, part, None) or importlib.import_module(here)
    return thing


EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("molora", "molora_kernels", "bench")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_of_docstrings_give_what_they_show(module: str) -> None:
    here = importlib.import_module(module)
    assert "+SKIP" not in inspect.getsource(here)
    failed, tried = doctest.testmod(here)
    assert tried and not failed


# --- run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name and do not make: models, rows and benches."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("base", "data/quickstart/model", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(tiny_model_dir)
    (folder / "data/reasoning").mkdir()
    for seed, name in enumerate(
        [
            *("rows", "held_out", "general", "data/mine", "data/general.bench"),
            *("data/sft_50k_en_ko_raw", "data/quickstart/general.train", "data/quickstart/general.bench"),
        ]
    ):
        write_jsonl(folder / f"{name}.jsonl", make_rows(8 if "bench" in name else 96, seed=seed))
    for seed, name in enumerate(
        [
            *("maths", "data/maths.bench", "data/reasoning/openr1_math_40k"),
            *("data/quickstart/maths.train", "data/quickstart/maths.bench"),
        ],
        start=100,
    ):
        rows = [row | {"answer": "3"} for row in make_rows(8 if "bench" in name else 96, seed=seed)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def stages(given: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The runs of the quickstart's two presets on ``given``."""
    runs: dict[int, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        spare_compiling(patch)
        patch.chdir(given)
        for stage, (preset, _) in enumerate(quickstart.STAGES.values(), start=1):
            runs[stage] = tmp_path_factory.mktemp("stages") / f"stage{stage}"
            model = f"model_name={runs[1] / 'final' if stage == 2 else 'base'}"
            run(f"python -m molora.train --preset {preset} --output-dir {runs[stage]} --set {model}", patch)
    return runs


def spare_compiling(patch: pytest.MonkeyPatch) -> None:
    """No C++ is compiled: fifteen seconds for each program, and no page is about it."""
    patch.setattr(backend, "compiler_installed", lambda: False)
    patch.setenv("CXX", "no-compiler")
    patch.setenv("ACCELERATE_USE_CPU", "true")
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("PYTHONPATH", str(ROOT))


RUNNABLE = [page for page in PAGES if any(block.language in (SHELL, PYTHON) for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("hub")
def test_a_page_runs_from_top_to_bottom(
    page: Path, given: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_packages(page)
    name, here = str(page.relative_to(ROOT)), tmp_path / "here"
    shutil.copytree(given, here, symlinks=True)
    for path, stage in TRAINED.get(name, {}).items():
        run_folder = request.getfixturevalue("stages")[stage]
        shutil.copytree(run_folder if "stage" in Path(path).name else run_folder / "final", here / path)
    for path in re.findall(r"--out (\S+)", page.read_text(encoding="utf-8")):
        (here / path).unlink(missing_ok=True)  # the page makes it
    make_tables(page, here)
    spare_compiling(monkeypatch)
    monkeypatch.chdir(here)
    ids = torch.arange(10, 26).reshape(2, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    # What a training loop has at hand.
    names: dict[str, Any] = {"__name__": "__main__", "micro_batches": [batch, batch], **batch}
    for block in blocks(page):
        if block.language == PYTHON:
            print(f"{name}:{block.line}")
            exec(compile("\n" * block.line + block.text, page, "exec"), names)
        elif block.language == SHELL:
            for command in commands(block):
                if not reason(command):
                    run(command, monkeypatch)


def require_packages(page: Path) -> None:
    """Skip a page whose code needs a package that is not here."""
    text = "\n".join(block.text for block in blocks(page))
    wanted = set(re.findall(r"^(?:from|import) (accelerate|datasets|peft|trl)\b", text, flags=re.MULTILINE))
    wanted |= {"math_verify"} if re.search(r"molora\.(answers|evaluate|verdict)", text) else set()
    wanted |= {"matplotlib", "jinja2"} if "molora.report" in text else set()
    wanted |= {"datasets"} if "prepare convert" in text else set()
    wanted |= {"tensorboard"} if "logging.tensorboard=true" in text else set()
    wanted |= {"bitsandbytes"} if re.search(r"\bint[48]\b", text) and page.parent.name == "how-to" else set()
    for package in sorted(wanted):
        pytest.importorskip(package)


def make_tables(page: Path, here: Path) -> None:
    """The data sets of other people that a page converts."""
    if "prepare convert" not in page.read_text(encoding="utf-8"):
        return
    import datasets

    rows = make_rows(24, seed=7)
    alpaca = {"instruction": [row["prompt"] for row in rows], "output": [row["response"] for row in rows]}
    datasets.Dataset.from_dict(alpaca).to_parquet(here / "alpaca.parquet")
    (here / "openai/gsm8k").mkdir(parents=True)
    gsm8k = {"question": alpaca["instruction"], "answer": alpaca["output"]}
    datasets.Dataset.from_dict(gsm8k).to_parquet(here / "openai/gsm8k/train.parquet")
    (here / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"
    )


def run(command: str, patch: pytest.MonkeyPatch) -> None:
    """Run a command of a page: one of ours in this process, torchrun in those that it starts. A command with
    ``--resume`` finds its run as if it had been killed before its last checkpoint."""
    print(f"$ {command}")
    for written, instead in INSTEAD.items():
        command = command.replace(written, instead)
    program, *rest = shlex.split(command)
    rest += [word for pattern, more in SHORTER.items() if re.search(pattern, command) for word in more]
    resumed = "--resume" in rest and cut_short(Path(rest[rest.index("--output-dir") + 1]))
    if program == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", *rest]
        done = subprocess.run(start, check=False, text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        assert program == "python" and rest[0] == "-m" and rest[1].startswith(MODULES), command
        printed = run_module(rest[1], rest[2:], patch)
    assert not resumed or "goes on from" in printed, printed


def run_module(module: str, arguments: list[str], patch: pytest.MonkeyPatch) -> str:
    """``python -m module arguments``, with one question at standard input; returns what it prints."""
    printed = io.StringIO()
    with patch.context() as inner:
        inner.setattr(sys, "argv", [module, *arguments])
        inner.setattr(sys, "stdin", io.StringIO("What is 3 + 4?\n"))
        inner.setattr(sys, "stdout", printed)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        except SystemExit as exit_:
            assert not exit_.code, f"exit code {exit_.code}"
    print(printed.getvalue())
    return printed.getvalue()


def cut_short(output: Path) -> bool:
    """Take away the end of the run in ``output``; False where there is none yet."""
    written = sorted(output.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not written:
        return False
    assert len(written) > 1, f"{output}: nothing is left to go on from"
    for path in (output / "final", written[-1]):
        shutil.rmtree(path)
    return True


# --- parsed ------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Raised in place of doing what was asked for."""


@pytest.mark.parametrize(
    "command", [pytest.param(command, id=f"{at} {command[:60]}") for at, command in shell_commands() if reason(command)]
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # a module that tests have imported is run again
def test_what_is_not_run_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program in ("pip", ".venv/bin/pip"):
        extras = re.findall(r'^        "([a-z]+)": \[', (ROOT / "setup.py").read_text(), flags=re.MULTILINE)
        wheel = re.search(r"molora-([\w.]+?)-py3", command)
        assert not wheel or wheel[1] == molora.__version__
        assert {extra for found in re.findall(r"\[(.*?)\]", " ".join(rest)) for extra in found.split(",")} <= set(
            extras
        )
    elif program in ("python", "torchrun"):
        module = rest.index("-m") + 1
        if rest[module] != "pip":
            assert rest[module].startswith(MODULES), rest
            parse(rest[module], rest[module + 1 :], monkeypatch)
    else:
        assert (ROOT / program).is_file(), f"{program}: not a command that this test knows"


def test_no_exception_is_out_of_date() -> None:
    lines = [command for _, command in shell_commands()]
    assert not [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, line) for line in lines)]
    run = [line for line in lines if not reason(line)]
    used = (*map(re.escape, INSTEAD), *SHORTER)
    assert not [pattern for pattern in used if not any(re.search(pattern, line) for line in run)]


def parse(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a module up to where its options are parsed; a training configuration is read and checked too."""
    understand = argparse.ArgumentParser.parse_args
    asked: list[argparse.Namespace] = []

    def stop(self: argparse.ArgumentParser, *given: Any, **named: Any) -> argparse.Namespace:
        asked.append(understand(self, *given, **named))
        # `python -m bench` parses its command first and then that command's own options.
        if vars(asked[-1]).keys() == {"command"} and len(asked) == 1 and arguments[1:]:
            return asked[-1]
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    if module == "molora.train":
        config.resolve(config.load(asked[0].preset, asked[0].set))
