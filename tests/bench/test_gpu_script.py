"""bench/gpu.sh where there is no GPU: with a python3 that writes down what it is asked, as if all of it ran."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from bench.__main__ import COMMANDS
from bench.all import commands

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
PYTHON = """#!/bin/sh
# Where it imports, it has everything; red tests, and a result for each benchmark.
[ "$1" = -c ] && exit 0
echo "$@" | grep -q "^-m pytest" && { echo "1 failed"; exit 1; }
for word; do printf '%s\\t' "$word" >>"$ASKED"; [ "$last" = --json ] && echo "{}" >"$word"; last=$word; done
echo >>"$ASKED"
"""


@pytest.fixture
def ran(tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("needs bash and coreutils")
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    asked = tmp_path / "asked"
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", str(SCRIPT), "tests", "core", "recipe", "more"], env=environment | {"ASKED": str(asked)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, [line.split("\t")[:-1] for line in asked.read_text().splitlines()]


def test_red_tests_cost_no_benchmark_and_are_not_forgotten(
    ran: tuple[subprocess.CompletedProcess[str], list[list[str]]], tmp_path: Path
) -> None:
    done, asked = ran
    assert done.returncode == 1, done.stderr
    assert "== tests-real: exit 1" in done.stdout and len(asked) > 5
    names = [Path(words[words.index("--json") + 1]).stem for words in asked]
    assert set(names) <= {name for name, _ in commands("cuda")}  # what tables and plots look for
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "gpu.tar.gz" in files and len(files) <= 8
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as packed:
        inside = {Path(name).name for name in packed.getnames()}
    assert {"tests-small.log", *(f"{name}.json" for name in names), *(f"{name}.log" for name in names)} <= inside
    assert json.loads((tmp_path / "out" / "mlp-cuda-bf16.json").read_text()) == {}


def test_its_benchmarks_are_ones_that_exist(ran: tuple[subprocess.CompletedProcess[str], list[list[str]]]) -> None:
    for _m, _bench, command, *arguments in ran[1]:
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[command]).add_arguments(parser)
        parser.parse_args(arguments)
