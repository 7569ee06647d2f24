"""What a command is told wrongly ends in one line and exit code 2, before anything is measured."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import arguments, decode, mlp, record
from bench.__main__ import main


def told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of the error."""
    try:
        code = main(argv)
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said, said
    return said.splitlines()[-1]


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("too late: it is being measured")

    monkeypatch.setattr(mlp, "measured", measured)
    monkeypatch.setattr("bench.step.fault", measured)
    monkeypatch.setattr("bench.expand._measured", measured)
    monkeypatch.setattr("bench.op.roofline", measured)
    monkeypatch.setattr(decode, "_generate", measured)


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("mlp --rounds 0", "--rounds: 0: must be at least 1"),
        ("host --rounds 0", "--rounds: 0: must be at least 1"),
        ("expand --rounds 0", "--rounds: 0: must be at least 1"),
        ("metrics --warmup -1", "--warmup: -1: must be at least 0"),
        ("mlp --tokens 0", "--tokens: 0: must be at least 1"),
        ("expand --columns x", "--columns: x: is no whole number"),
        ("op --threads 0", "--threads: 0: must be at least 1"),
        ("mlp --dtype fp8", "--dtype: invalid choice: 'fp8'"),
        ("op --dtype fp8", "--dtype: invalid choice: 'fp8'"),
        ("sweep --over rank --dtype fp8", "--dtype: invalid choice: 'fp8'"),
        ("sweep --over rank --values 0", "--values: 0: must be at least 1"),
        ("tune --dtype fp8", "--dtype: invalid choice: 'fp8'"),
        ("mlp --dropout 1", "--dropout: 1: must be at least 0 and below 1"),
        ("mlp --device gpu", "--device: gpu: must be cpu, cuda"),
        ("mlp --top-k 5", "--top-k 5: is more than the 4 experts"),
        ("op --top-k 5", "--top-k 5: is more than the 4 experts"),
        ("step --experts 1", "num_experts=1: a mixture needs at least 2"),
        ("step --top-k 5", "top_k=5 is larger than num_experts=4"),
        ("sweep --over layers --top-k 5", "top_k=5 is larger than num_experts=4"),
        ("sweep --over layers --tokens 64 --hidden 128", "--tokens, --hidden: a training step has none"),
        ("sweep --over layers --only mixlora", "--only mixlora: is no training step"),
        ("sweep --over top_k --values 2 16", "--top-k 16: is more than the 8 experts"),
        ("sweep --over tokens --tokens 64", "--tokens: is what is swept; say --values"),
        ("decode --model m --tokens 1", "--tokens: 1: must be at least 2"),
        ("decode --model m --batch 4 0", "--batch: 0: must be at least 1"),
        ("decode --model /nonexistent", "/nonexistent"),
        ("metrics --set nonsense=3", "nonsense"),
        ("all --match typo", "--match typo: no result's name for cpu contains it"),
        ("all --match cuda --list", "--match cuda: no result's name for cpu contains it"),
        ("compile --arch foo", "--arch: foo: must be the compute capability of a CUDA GPU"),
        ("compile --arch 12", "--arch: 12: must be the compute capability of a CUDA GPU"),
        ("compile --kernel nothing --arch 90 77", "--arch: 77: must be the compute capability of a CUDA GPU"),
        ("compile --merge /nonexistent.json", "--merge /nonexistent.json: cannot be read"),
    ],
)
def test_a_mistake_is_told_in_one_line(argv: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in told(argv.split(), capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("argv", ["mlp --device cuda", "step --device cuda:1", "expand --device cuda", "tune"])
def test_a_device_that_is_not_there(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such device here" in told(argv.split(), capsys)


def test_only_files_of_the_compile_matrix_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, cut = tmp_path / "foreign.json", tmp_path / "cut.json"
    foreign.write_text(json.dumps({"op": "mlp"}))
    cut.write_text('{"runs": [')
    assert f"{foreign}: was not written by" in told(["compile", "--merge", str(foreign)], capsys)
    assert f"{cut}: cannot be read" in told(["compile", "--merge", str(cut)], capsys)


def test_what_is_not_a_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("of ours")

    monkeypatch.setattr(mlp, "measured", broken)
    with pytest.raises(ValueError, match="of ours"):
        main(["mlp"])


def test_a_mistake_is_told_without_pydantic_too() -> None:
    script = "import sys; sys.modules['pydantic'] = None; from bench.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "mlp", "--top-k", "5"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --top-k 5")


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(
    "command", ["mlp", "op", "expand", "step", "sweep --over rank", "decode --model m", "host", "metrics", "compile"]
)
def test_where_a_result_cannot_be_written_nothing_is_measured(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, within_a_file = tmp_path / "folder", tmp_path / "file" / "result.json"
    folder.mkdir()
    within_a_file.parent.write_text("")
    assert f"--json {folder}: is no file" in told([*command.split(), "--json", str(folder)], capsys)
    assert f"--json {within_a_file}: cannot be written" in told(
        [*command.split(), "--json", str(within_a_file)], capsys
    )
    assert sorted(tmp_path.iterdir()) == [within_a_file.parent, folder]


def test_the_compile_matrixs_table_has_to_be_writable_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--markdown /dev/null: is no file" in told(["compile", "--markdown", "/dev/null"], capsys)


def test_a_disk_that_fills_up_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old.json"
    old.write_text("{}")

    def full(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:1].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(arguments.Mistake, match=r"cannot be written \(No space left on device\); make room"):
        record.write(old, {"op": "mlp"})
    assert list(tmp_path.iterdir()) == [old] and old.read_text() == "{}"


def test_a_result_that_is_there_may_be_written_again(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("{}")
    arguments.check(argparse.Namespace(json=str(old), markdown=tmp_path / "new" / "table.md"))
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["new", "old.json"] and old.read_text() == "{}"
