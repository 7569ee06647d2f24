from __future__ import annotations

import errno

import pytest

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


def test_success_and_our_own_bugs() -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: None)
    assert exit_.value.code == 0
    with pytest.raises(OSError, match="odd"):
        cli.run(failing(OSError(errno.EIO, "odd")))
