"""Train and bench files out of one stream of rows: no question in both, the same bytes for the same seed."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from tqdm import tqdm

from molora import chat, files
from molora.errors import UserError
from molora.prepare.rows import Row, check_disjoint, question_key, write_jsonl

Candidate = Row | str
"""A row, or in a few words why there is none."""


class Picker:
    """Takes the first usable rows of a stream, each question once: the bench first, then train.

    ``left_out`` counts why the others were passed over.
    """

    def __init__(self, fits: Fits) -> None:
        self.fits = fits
        self.seen: set[str] = set()
        self.left_out: Counter[str] = Counter()

    def pick(self, candidates: Iterable[Candidate], train: int, bench: int, what: str) -> tuple[list[Row], list[Row]]:
        """``train`` and ``bench`` rows. Raises :class:`UserError` if the stream ends before there are enough."""
        usable = islice(self._usable(candidates), train + bench)
        rows = list(tqdm(usable, total=train + bench, desc=what, unit="row", disable=None))
        if len(rows) == train + bench:
            return rows[bench:], rows[:bench]
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        raise UserError(
            f"{what}: {len(rows)} usable rows, {train} to train on and {bench} for the bench are asked for"
            f"{f' (left out: {reasons})' if reasons else ''}; lower --train-rows or --bench-rows"
        )

    def _usable(self, candidates: Iterable[Candidate]) -> Iterator[Row]:
        for candidate in candidates:
            reason = candidate if isinstance(candidate, str) else self._why_not(candidate)
            if reason is None:
                yield candidate  # pyright: ignore[reportReturnType]
            else:
                self.left_out[reason] += 1

    def _why_not(self, row: Row) -> str | None:
        key = question_key(question(row))
        if not key:
            return "no question"
        if key in self.seen:
            return "question seen before"
        if not self.fits(row):
            return "longer than --max-length"
        self.seen.add(key)
        return None


class Fits:
    """Whether a row has at most ``max_length`` tokens in the chat format; without a tokenizer every row fits."""

    def __init__(self, tokenizer: str | None, max_length: int | None) -> None:
        if (tokenizer is None) != (max_length is None):
            raise UserError("--tokenizer and --max-length go together: tokens of which model, and how many at most")
        self.max_length = max_length or 0
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer else None

    def __call__(self, row: Row) -> bool:
        if self.tokenizer is None:
            return True
        return not chat.encode_row(self.tokenizer, row, self.max_length).truncated


def question(row: Row) -> str:
    """What a row asks: its prompt, or what the user says in it, or its text."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"] if message["role"] == "user")
    return row["prompt"] if "prompt" in row else row["text"]


def answers(row: Row) -> str:
    """What a row teaches to say."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"] if message["role"] == "assistant")
    return row["response"] if "response" in row else row["text"]


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name}: is no folder or hub model with a tokenizer that can be read") from error


# --- files -------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, train: str, bench: str, train_rows: int, bench_rows: int) -> None:
    """The options that every subject with a train and a bench file has."""
    parser.add_argument(
        "--out", type=Path, default=Path(train), metavar="FILE", help="train rows (default: %(default)s)"
    )
    parser.add_argument("--bench", type=Path, default=Path(bench), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--train-rows", type=_positive, default=train_rows, metavar="N", help="default: %(default)s")
    parser.add_argument("--bench-rows", type=_positive, default=bench_rows, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="of the choice and the order (default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="MODEL", help="folder or hub name; with --max-length")
    parser.add_argument(
        "--max-length", type=_positive, metavar="N", help="leave out rows of more tokens, which training would cut"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that were made otherwise")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def recipe_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what the files hold."""
    names = ("train_rows", "bench_rows", "seed", "tokenizer", "max_length")
    return {name: getattr(options, name) for name in names}


def manifest_path(out: Path) -> Path:
    return out.with_suffix(".manifest.json")


def up_to_date(out: Path, bench: Path, recipe: dict[str, Any], overwrite: bool) -> bool:
    """Whether both files are there as ``recipe`` makes them; needs no network.

    Raises :class:`UserError` if one is there that was made otherwise and may not be replaced.
    """
    if out.resolve() == bench.resolve():
        raise UserError(f"{out}: --out and --bench are the same file; give two names")
    for path in (out, bench):
        files.check_target(path)
    if overwrite:
        return False
    there = [path for path in (out, bench) if path.exists()]
    if not there:
        return False
    try:
        manifest = json.loads(manifest_path(out).read_text(encoding="utf-8"))
        hashes = {name: described["sha256"] for name, described in manifest["files"].items()}
        same_recipe = manifest["recipe"] == recipe
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same_recipe, hashes = False, {}
    if same_recipe and all(path.exists() and hashes.get(str(path)) == files.file_sha256(path) for path in (out, bench)):
        return True
    raise UserError(
        f"{there[0]}: is there already and was made otherwise, or changed since; choose another name, or replace it "
        "with --overwrite"
    )


def write(
    out: Path,
    bench: Path,
    rows: tuple[list[Row], list[Row]],
    recipe: dict[str, Any],
    sources: list[dict[str, Any]],
    left_out: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Both files and their manifest, which is written last; returns the manifest."""
    check_disjoint(*[[{"prompt": question(row)} for row in part] for part in rows])
    described = {}
    for path, part in zip((out, bench), rows, strict=True):
        write_jsonl(path, part)
        counts = Counter("/".join(str(row[key]) for key in ("domain", "language") if key in row) for row in part)
        described[str(path)] = {
            "sha256": files.file_sha256(path),
            "rows": len(part),
            "counts": dict(sorted(counts.items())),
        }
    manifest = {"recipe": recipe, "sources": sources, "left_out": left_out, "files": described}
    files.write_text(manifest_path(out), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def report(manifest: dict[str, Any], console: Console | None = None) -> None:
    """What was written and what was left out, in a few lines."""
    console = console or Console()
    for name, described in manifest["files"].items():
        counts = ", ".join(f"{count} {group}" for group, count in described["counts"].items())
        console.print(f"{escape(name)}: {described['rows']} rows ({escape(counts)})", highlight=False, soft_wrap=True)
    for name, reasons in manifest["left_out"].items():
        if reasons:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            console.print(f"left out of {escape(name)}: {escape(counts)}", highlight=False, soft_wrap=True)
