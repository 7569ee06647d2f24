"""The compile matrix joins what runs of single architectures wrote, and its verdict is that of all rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

compile_matrix = pytest.importorskip("bench.compile")

ROW = compile_matrix.Compiled("90", "a_kernel", "bf16", "block_t=64", 96, 0, 4096, 227 * 1024, "wgmma", "")


def merge(paths: list[Path], **outputs: Path) -> int:
    parser = argparse.ArgumentParser()
    compile_matrix.add_arguments(parser)
    given = [word for name, path in outputs.items() for word in (f"--{name}", str(path))]
    return compile_matrix.run(parser.parse_args(["--merge", *map(str, paths), *given]))


def test_runs_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [{"commit": "0123456789", "packages": {"triton": "3.9.0"}}]
    good, bad = tmp_path / "90.json", tmp_path / "86.json"
    spilled = replace(ROW, arch="86", spilled=8, fault="8 bytes a thread spilled")
    compile_matrix._write_json(good, sources, [ROW])
    compile_matrix._write_json(bad, sources, [spilled])
    assert merge([good]) == 0
    assert merge([good, bad], json=tmp_path / "all.json", markdown=tmp_path / "all.md") == 1
    assert "2 compiled, 1 at fault" in capsys.readouterr().out
    joined = json.loads((tmp_path / "all.json").read_text())
    assert len(joined["runs"]) == 2 and [row[0] for row in joined["rows"]] == ["86", "90"]
    table = (tmp_path / "all.md").read_text()
    assert "2 cases, 1 at fault" in table and "| a_kernel | sm_86 | 1 | 96 | 8 |" in table
    assert "commit `0123456`" in table


def test_a_kernel_compiled_again_takes_the_place_of_what_it_was(tmp_path: Path) -> None:
    sources = [{"commit": "0123456789", "packages": {"triton": "3.9.0"}}]
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    compile_matrix._write_json(old, sources, [ROW, replace(ROW, label="fp16"), replace(ROW, kernel="b_kernel")])
    compile_matrix._write_json(new, sources, [replace(ROW, registers=80)])
    assert merge([old, new], json=tmp_path / "all.json") == 0
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [row[1:3] + row[4:5] for row in rows] == [["a_kernel", "bf16", 80], ["b_kernel", "bf16", 96]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], compile_matrix.ARCHITECTURES),
        (["--quick"], ("80", "90", "120")),
        (["--quick", "--arch", "86", "gfx942"], ["86", "gfx942"]),
        (["--arch", "86"], ["86"]),
    ],
)
def test_the_architectures_asked_for_are_compiled(
    words: list[str], expected: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Sequence[str], bool]] = []

    def tasks(architectures: Sequence[str], quick: bool) -> list[object]:
        asked.append((architectures, quick))
        return []

    monkeypatch.setattr(compile_matrix, "_tasks", tasks)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the command sets, and others' tests need as it is
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    parser = argparse.ArgumentParser()
    compile_matrix.add_arguments(parser)
    with pytest.raises(SystemExit):
        compile_matrix.run(parser.parse_args([*words, "--kernel", "nothing"]))
    assert asked == [(expected, "--quick" in words)]
