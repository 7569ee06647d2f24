"""Rows of training data, JSONL files of them, and when two rows ask the same question."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from molora import files
from molora.errors import UserError

Row = dict[str, Any]


def question_key(text: str) -> str:
    """What stays the same when a question is merely written differently: its letters, digits, ``+`` and ``-``.

    Case, spaces and punctuation go (Korean writers differ about spaces); the signs stay, or ``6 + 7`` would be
    ``6 - 7``.
    """
    return re.sub(r"[^\w+-]|_", "", unicodedata.normalize("NFKC", text).casefold())


def check_disjoint(train: Iterable[Row], bench: Iterable[Row]) -> None:
    """Raise :class:`UserError` if a question of ``bench`` is in ``train``: such a bench measures memory."""
    shared = {question_key(row["prompt"]) for row in train} & {question_key(row["prompt"]) for row in bench}
    if shared:
        raise UserError(
            f"{len(shared)} questions are in both train and bench, e.g. {sorted(shared)[:3]}; take them out of one"
        )


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, UTF-8; the same rows give the same bytes. Raises :class:`UserError` where a row has half
    a character, or the file cannot be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        files.write_text(path, text)
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair (an emoji cut in two)
        before = text[max(0, error.start - 40) : error.start].rpartition("\n")[2]
        raise UserError(
            f"{path}: not written, a row has half of a surrogate pair (\\ud800 to \\udfff) after …{before}; remove it "
            "or mend the emoji"
        ) from None


def read_jsonl(path: Path) -> list[Row]:
    """All rows of a file. Blank lines pass; what is not a JSON object is a :class:`UserError` with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            # Windows editors put a mark at the beginning of a file; training reads past it too.
            row = json.loads(line.removeprefix("\ufeff"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from error
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}, line {number}: not JSON that can be read ({error})") from error
        if not isinstance(row, dict):
            raise UserError(
                f'{path}, line {number}: expected an object such as {{"prompt": …}}, found {line.strip()[:40]}'
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows
