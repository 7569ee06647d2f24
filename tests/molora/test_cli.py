from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from molora import cli
from molora.errors import UserError


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a\n  b; mend it"), 2, "error: a b; mend it\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "f"),
            2,
            "error: f: No space left on device; make room and try again\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nMore"),
            2,
            "error: the GPU's memory is full (CUDA out of memory. More); "
            "lower the batch size, or keep the base in 4 bits (int4)\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.run(failing(error))
    assert exit_.value.code == code
    assert capsys.readouterr().err == message


def run_printing(text: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    code = f"from molora import cli; cli.run(lambda: print({text!r}))"
    return subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.PIPE, text=True, **settings)


def test_nobody_reads_the_output_any_more() -> None:
    read, write = os.pipe()
    os.close(read)
    ended = run_printing("short, so that it is written at the end", stdout=write)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "stopped: nobody reads the output any more\n")


def test_what_the_terminal_cannot_show_costs_no_result() -> None:
    ended = run_printing("Δ 안", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\\u0394 \\uc548\n", "")


def test_success_and_our_own_bugs() -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: None)
    assert exit_.value.code == 0
    with pytest.raises(OSError, match="odd"):
        cli.run(failing(OSError(errno.EIO, "odd")))
