"""The code in README and docs/ works: Python blocks run, in the order of their section, beside a tiny random model;
commands are parsed by the programs they name, so that a misspelt option, key or preset fails."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora import config, convert
from tests.conftest import make_rows, write_jsonl

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ("molora.", "bench")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def programs() -> list:
    """(page and heading, the blocks under that heading as one program); a heading's program has what came before it on
    the page where it does not import molora itself."""
    found = []
    for page in PAGES:
        before = ""
        for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            program = "\n".join(blocks(section, "python"))
            if program:
                before = program if "import molora" in program else f"{before}\n{program}"
                found.append(pytest.param(before, id=f"{page.relative_to(ROOT)}: {section.splitlines()[0]}"))
    return found


def commands() -> list:
    """Every command line of every shell block."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "(?:sh|bash|console)"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.append(pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)[:60]}"))
    return found


@pytest.mark.parametrize("program", programs())
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("hub")
def test_python_blocks_run(program: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("accelerate", "datasets", "math_verify", "peft", "trl"):
        if (
            f"import {package}" in program
            or f"from {package}" in program
            or ("answers" in program and "math" in package)
        ):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("base", "data/quickstart/model"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(tiny_model_dir)
    write_jsonl(tmp_path / "rows.jsonl", make_rows(16))
    for kind, options in (("whole", ["export"]), ("lora", ["merge"]), ("dense", ["merge", "--into", "base"])):
        if f'"out/{kind}"' in program:
            model, tokenizer = molora.load("base", device="cpu")
            molora.save_adapter(molora.inject(model, {"lora_r": 4, "init_b_std": 0.02}), "adapter")
            tokenizer.save_pretrained("adapter")
            convert.main([options[0], "adapter", f"out/{kind}", *options[1:]])
    ids = torch.arange(10, 26).reshape(2, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    # What a training loop has at hand.
    exec(compile(program, "example", "exec"), {"__name__": "__main__", "micro_batches": [batch, batch], **batch})


class Parsed(Exception):
    """Raised in place of doing what was asked for."""


@pytest.mark.parametrize("words", commands())
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # a module that tests have imported is run again
def test_commands_are_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program in ("pip", ".venv/bin/pip"):
        extras = re.findall(r'^        "([a-z]+)": \[', (ROOT / "setup.py").read_text(), flags=re.MULTILINE)
        assert {extra for found in re.findall(r"\[(.*?)\]", " ".join(rest)) for extra in found.split(",")} <= set(
            extras
        )
    elif program in ("python", "python3", ".venv/bin/python", "torchrun"):
        module = rest.index("-m") + 1
        assert rest[module].startswith(MODULES), rest
        parse(rest[module], rest[module + 1 :], monkeypatch)
    else:
        assert (ROOT / program).is_file(), f"{program}: not a command that this test knows"


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
