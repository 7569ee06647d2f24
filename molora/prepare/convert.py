"""``convert``: other people's columns to our rows.

What is recognised without being told, by the columns that are there:

| columns | shape | becomes |
|---|---|---|
| ``messages``: ``[{"role", "content"}]`` | chat | ``prompt`` and ``response``, or ``messages`` |
| ``conversations``: ``[{"from", "value"}]`` | ShareGPT | the same |
| ``instruction``, ``output``, perhaps ``input`` | Alpaca | ``prompt`` and ``response`` |
| ``instruction``, ``response``, perhaps ``context`` | Dolly | the same |
| ``prompt`` and ``response`` or ``completion`` | ours, OpenAI's | the same |
| ``text`` | plain text | ``text`` |

Anything else is refused with the columns that were seen; ``--map prompt=question,response=answer`` says what is what.
``answer``, ``domain``, ``language`` and ``task`` are carried over where they are strings or numbers.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from molora import files
from molora.errors import UserError
from molora.prepare import hub
from molora.prepare.rows import Row, read_jsonl, write_jsonl

TARGETS = ("prompt", "response", "messages", "text", "answer", "domain", "language", "task")
LABELS = ("answer", "domain", "language", "task")
"""Columns of ours that are carried over as they are; numbers become text."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Names of speakers in ShareGPT files and chats, and ours."""

ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv")
"""Of files that are read here; :data:`hub.FORMATS` are the ``datasets`` library's."""

Convert = Callable[[Mapping[str, Any]], Row]


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="rows from JSONL, CSV, parquet or the hub, whatever their columns",
        description="Write rows that molora reads from a JSONL, CSV, TSV or parquet file, a folder or a hub data set. "
        "Chats, ShareGPT, Alpaca and Dolly are recognised; --map names the columns of anything else.",
    )
    parser.add_argument("source", metavar="FILE|FOLDER|NAME", help="a file, a copy of a hub data set, or its hub name")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    parser.add_argument(
        "--map", metavar="OURS=THEIRS,…", help=f"which of their columns is which of ours ({', '.join(TARGETS)})"
    )
    parser.add_argument("--domain", metavar="LABEL", help="label of every row, e.g. general or maths")
    parser.add_argument("--config", help="configuration of a hub data set")
    parser.add_argument("--split", default="train", help="of a hub data set (default: %(default)s)")
    parser.add_argument("--revision", default="main", help="of a hub data set: branch, tag or commit")
    parser.add_argument("--overwrite", action="store_true", help="replace the file named by --out")
    parser.set_defaults(prepare=prepare)


def prepare(options: argparse.Namespace) -> None:
    files.check_target(options.out, [options.source])
    if options.out.exists() and not options.overwrite:
        raise UserError(f"{options.out}: exists already; choose another --out, or replace it with --overwrite")
    mapping = None if options.map is None else parse_map(options.map)
    items, provenance = read(options)
    rows, left_out = convert(items, options.source, mapping, options.domain)
    write_jsonl(options.out, rows)
    print(
        f"{options.out}: {len(rows)} rows", *(f"; left out: {count} {why}" for why, count in left_out.items()), sep=""
    )
    print(f"from {', '.join(f'{key} {value}' for key, value in provenance.items() if value)}")


def convert(
    items: Sequence[Mapping[str, Any]] | Any, where: str, mapping: Mapping[str, str] | None, domain: str | None
) -> tuple[list[Row], Counter[str]]:
    """All items as rows, and how many were left out and why.

    The first item decides the shape. Raises :class:`UserError`, with the item's number, for what has another.
    """
    columns = list(items[0])
    if not columns:
        raise UserError(f"{where}, row 1: has no columns")
    shape = mapped(mapping, columns, where) if mapping else recognise(columns, where)
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    for number, item in enumerate(tqdm(items, desc="convert", unit="row", disable=None), start=1):
        try:
            row = shape(item) | _labels(item, mapping)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}, row {number}: {reason}; its columns are {', '.join(item)}") from error
        if domain is not None:
            row["domain"] = domain
        if why := unusable(row):
            left_out[why] += 1
        else:
            rows.append(row)
    if not rows:
        raise UserError(f"{where}: every row was left out ({', '.join(left_out)})")
    return rows, left_out


# --- shapes ------------------------------------------------------------------------------------------------------


def recognise(columns: Sequence[str], where: str) -> Convert:
    """How to convert rows that have these columns. Raises :class:`UserError` for columns nobody told us about."""
    has = set(columns)
    if "messages" in has:
        return lambda item: conversation_row(item["messages"])
    for column in ("conversations", "conversation"):
        if column in has:
            return lambda item: conversation_row(item[column])
    for question, more, answer in (("instruction", "input", "output"), ("instruction", "context", "response")):
        if {question, answer} <= has:
            return lambda item: {
                "prompt": "\n\n".join(filter(None, (_text(item, question), _text(item, more, optional=True)))),
                "response": _text(item, answer),
            }
    for answer in ("response", "completion"):
        if {"prompt", answer} <= has:
            return lambda item: {"prompt": _text(item, "prompt"), "response": _text(item, answer)}
    if "text" in has:
        return lambda item: {"text": _text(item, "text")}
    answer = "chosen" if "chosen" in has else columns[-1]  # of preferences, and not what was rejected
    raise UserError(
        f"{where}: columns {', '.join(map(repr, columns))} are no known shape (messages; conversations; instruction "
        "and output; instruction and response; prompt and response; text); say which is which, for example "
        f"--map prompt={columns[0]},response={answer}"
    )


def mapped(mapping: Mapping[str, str], columns: Sequence[str], where: str) -> Convert:
    """How to convert rows as ``--map`` says."""
    unknown = [theirs for theirs in mapping.values() if theirs not in columns]
    if unknown:
        raise UserError(f"{where}: has no column {', '.join(unknown)}; its columns are {', '.join(columns)}")
    if "messages" in mapping:
        return lambda item: conversation_row(item[mapping["messages"]])
    body = [ours for ours in ("prompt", "response", "text") if ours in mapping]
    if body not in (["prompt", "response"], ["text"]):
        raise UserError("--map needs prompt and response, or messages, or text: --map prompt=THEIRS,response=THEIRS")
    return lambda item: {ours: _text(item, mapping[ours]) for ours in body}


def parse_map(text: str) -> dict[str, str]:
    """``prompt=question,response=answer`` as a dictionary. Raises :class:`UserError`."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    for ours, equals, theirs in pairs:
        if not equals or ours.strip() not in TARGETS or not theirs.strip():
            raise UserError(f"--map {text}: write OURS=THEIRS,OURS=THEIRS with OURS one of {', '.join(TARGETS)}")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def conversation_row(turns: Any) -> Row:
    """A conversation as ``prompt`` and ``response`` if it is one question and one answer, else as ``messages``.

    ``turns`` are ``{"role", "content"}`` or ``{"from", "value"}``. What follows the last answer is cut. Raises
    ValueError for anything else, and for an unknown speaker.
    """
    if isinstance(turns, str) or not isinstance(turns, Iterable):
        raise ValueError(f"a conversation is a list of turns, not a {type(turns).__name__}")
    messages = [_message(turn) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    roles = [message["role"] for message in messages]
    if roles == ["user", "assistant"]:
        return {"prompt": messages[0]["content"], "response": messages[1]["content"]}
    return {"messages": messages}


def _message(turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a turn is an object with role and content, not a {type(turn).__name__}")
    speaker, text = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
    if speaker not in ROLES:
        raise ValueError(f"the speaker {speaker!r} is none of {', '.join(ROLES)}")
    if not isinstance(text, str | None):
        raise ValueError(f"a turn's content is a {type(text).__name__}, not text")
    return {"role": ROLES[speaker], "content": (text or "").strip()}


def _text(item: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    value = item.get(column) if optional else item[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is a {type(value).__name__}, not text")
    return value.strip()


def _labels(item: Mapping[str, Any], mapping: Mapping[str, str] | None) -> Row:
    # Without a mapping a column of ours is what it says; with one, only what it names is carried over.
    columns = {label: mapping.get(label) for label in LABELS} if mapping else {label: label for label in LABELS}
    found = {label: item.get(theirs) for label, theirs in columns.items() if theirs is not None}
    return {label: str(value) for label, value in found.items() if isinstance(value, str | int | float) and value != ""}


def unusable(row: Row) -> str | None:
    """Why a row cannot be trained on, or None."""
    if "messages" in row:
        roles = [message["role"] for message in row["messages"]]
        if "assistant" not in roles:
            return "without an answer"
        first = next(role for role in roles if role != "system")
        if first != "user":
            return "in which the assistant speaks first"
        return None if all(message["content"] for message in row["messages"]) else "with an empty turn"
    return next((f"without {key}" for key in ("prompt", "response", "text") if row.get(key) == ""), None)


# --- reading -----------------------------------------------------------------------------------------------------


def read(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The items of a file, a folder or a hub set, and where they are from."""
    path = Path(options.source).expanduser()
    ending = path.suffix.lower()
    if ending in (*ENDINGS, *hub.FORMATS) and not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_file() and ending in ENDINGS:
        read_file = read_jsonl if ending in (".jsonl", ".ndjson") else read_csv
        return read_file(path), {"file": path, "sha256": files.file_sha256(path)}
    if path.is_file() and ending not in hub.FORMATS:
        raise UserError(f"{path}: ends in none of {', '.join((*ENDINGS, *hub.FORMATS))}; unpack or rename it")
    source = hub.source_of(options.source, options.source, options.config, options.revision, options.split)
    loaded = hub.load(source)
    if not len(loaded.rows):
        raise UserError(f"{options.source}: holds no rows")
    return loaded.rows, loaded.provenance


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV or TSV file with a header, every value as text: ``007`` stays ``007``."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            items = list(reader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise UserError(f"{path}: not CSV that can be read ({error})") from error
    if not items:
        raise UserError(f"{path}: holds no rows below its header")
    for number, item in enumerate(items, start=2):
        if None in item or None in item.values():
            raise UserError(f"{path}, row {number}: has another number of columns than the header")
    return items
