"""``check``: is the data right? Counts, lengths, what training would cut, duplicates, and questions in two files."""

from __future__ import annotations

import argparse
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from molora import chat, files
from molora.colours import colour
from molora.config import Data
from molora.data import read_rows
from molora.errors import UserError
from molora.prepare import split
from molora.prepare.rows import Row, question_key

UNCUT = 10**9
"""Tokens; longer than any row."""

BAR = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class FileReport:
    """What is in one file."""

    path: Path
    rows: int
    domains: dict[str, int]
    languages: dict[str, int]
    lengths: dict[str, np.ndarray]
    """Tokens of each row in the chat format, by domain."""
    cut: int
    """Rows longer than ``max_length``, which lose their end."""
    lost: int
    """Rows without a token to learn within ``max_length``; training leaves them out."""
    repeated: int
    """Rows whose question stood in an earlier row of the file."""
    copies: int
    """Those of them whose answer did too."""
    questions: frozenset[str]

    @property
    def all_lengths(self) -> np.ndarray:
        return np.concatenate(list(self.lengths.values()))


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "check",
        help="counts, lengths, truncation, duplicates and overlap of JSONL files",
        description="Show what is in JSONL files as training would read them: rows by domain and language, a histogram "
        "of lengths, the share that max_length cuts, duplicates, and questions of a bench that are trained on.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL files to train on")
    parser.add_argument("--bench", nargs="+", type=Path, default=[], metavar="FILE", help="JSONL files to measure on")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="folder or hub name of the model to train")
    parser.add_argument(
        "--max-length", type=int, default=Data().max_length, metavar="N", help="data.max_length (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the histograms to this PNG, SVG or PDF file")
    parser.set_defaults(prepare=prepare)


def prepare(options: argparse.Namespace) -> None:
    if options.max_length < 2:
        raise UserError(f"--max-length {options.max_length}: must be at least 2")
    if options.picture and options.picture.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--picture {options.picture}: must end in .png, .svg or .pdf")
    if options.picture:
        files.check_target(options.picture)
    tokenizer = split.load_tokenizer(options.tokenizer)
    reports = [inspect(path, tokenizer, options.max_length) for path in [*options.files, *options.bench]]
    show(reports, len(options.files), options.max_length, Console())
    if options.picture:
        draw(reports, options.max_length, options.picture)
        print(f"{options.picture}: written")


def inspect(path: Path, tokenizer: Any, max_length: int) -> FileReport:
    """Read a file as training does. Raises :class:`UserError` as :func:`molora.data.read_rows`."""
    rows = read_rows(path)
    lengths: dict[str, list[int]] = {}
    questions: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    lost = cut = repeated = copies = 0
    for row in tqdm(rows, desc=path.name, unit="row", disable=None):
        encoded = _encode(tokenizer, row)
        lengths.setdefault(row["domain"], []).append(len(encoded.input_ids))
        cut += len(encoded.input_ids) > max_length
        lost += all(label == chat.IGNORE for label in encoded.labels[1:max_length])
        key = question_key(split.question(row))
        pair = (key, question_key(split.answers(row)))
        repeated += key in questions
        copies += pair in pairs
        questions.add(key)
        pairs.add(pair)
    return FileReport(
        path=path,
        rows=len(rows),
        domains=dict(Counter(row["domain"] for row in rows).most_common()),
        languages=dict(Counter(language(row) for row in rows).most_common()),
        lengths={domain: np.array(values) for domain, values in sorted(lengths.items())},
        cut=cut,
        lost=lost,
        repeated=repeated,
        copies=copies,
        questions=frozenset(questions),
    )


def _encode(tokenizer: Any, row: Row) -> chat.Encoded:
    try:
        return chat.encode_row(tokenizer, row, UNCUT)
    except UserError as error:
        raise UserError(f"{row['where']}: {error}") from error


def language(row: Row) -> str:
    """The row's own label, else the script that most letters of it are in (``Hangul``, ``Latin``, …)."""
    if isinstance(row.get("language"), str):
        return row["language"]
    text = split.question(row) + split.answers(row)
    scripts = Counter(unicodedata.name(letter, "?").split()[0].title() for letter in text if letter.isalpha())
    return scripts.most_common(1)[0][0] if scripts else "no letters"


# --- showing -----------------------------------------------------------------------------------------------------


def show(reports: Sequence[FileReport], train_files: int, max_length: int, console: Console) -> None:
    """A table of all files, and a line for every pair of files that share questions."""
    table = Table(title=f"rows as training reads them, max_length {max_length}", title_justify="left")
    table.add_column("")
    for report in reports:
        table.add_column(escape(report.path.stem), justify="right", overflow="fold")

    def line(name: str, cell: Callable[[FileReport], str]) -> None:
        table.add_row(name, *(escape(cell(report)) for report in reports))

    line("rows", lambda report: f"{report.rows:,}")
    line("domains", lambda report: _counts(report.domains))
    line("languages", lambda report: _counts(report.languages))
    line("median tokens", lambda report: f"{np.median(report.all_lengths):.0f}")
    line("95 % below", lambda report: f"{np.percentile(report.all_lengths, 95):.0f}")
    line("longest", lambda report: f"{report.all_lengths.max():,}")
    line(f"0 to {2 * max_length}", lambda report: bars(report.all_lengths, 2 * max_length))
    line("cut", lambda report: _share(report.cut, report.rows))
    line("lost", lambda report: _share(report.lost, report.rows))
    line("asked again", lambda report: _share(report.repeated, report.rows))
    line("row again", lambda report: _share(report.copies, report.rows))
    console.print(table)
    console.print(
        "cut: longer than max_length, so the end of the answer is not learnt; lost: no part of the answer within "
        "max_length, so training leaves the row out; again: as an earlier row of the same file",
        highlight=False,
    )
    for train in reports[:train_files]:
        for bench in reports[train_files:]:
            shared = len(train.questions & bench.questions)
            verdict = f"[red]{shared} questions of the bench are trained on[/]" if shared else "no question in both"
            names = f"{escape(train.path.name)} and {escape(bench.path.name)}"
            console.print(f"{names}: {verdict}", highlight=False, soft_wrap=True)


def bars(lengths: np.ndarray, stop: int, count: int = 12) -> str:
    """A histogram in one line of text; the last bar holds everything beyond."""
    heights, _ = np.histogram(np.minimum(lengths, stop - 1), bins=count, range=(0, stop))
    # A bar that holds any row is never empty.
    levels = np.ceil(heights / heights.max() * (len(BAR) - 1)).astype(int)
    return "".join(BAR[level] for level in levels)


def _counts(counts: dict[str, int]) -> str:
    return "\n".join(f"{count:,} {name}" for name, count in counts.items())


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if count else "0"


def draw(reports: Sequence[FileReport], max_length: int, path: Path) -> None:
    """Histograms of lengths, one panel a file, stacked by domain, with a line where ``max_length`` cuts."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs the package matplotlib: pip install matplotlib") from None
    domains = sorted({domain for report in reports for domain in report.lengths})
    # Beyond the 99th percentile are few rows, which would press all others against the axis.
    stop = max(1.1 * max_length, *(float(np.percentile(report.all_lengths, 99)) for report in reports))
    figure = Figure(figsize=(8, 1.2 + 1.7 * len(reports)), layout="constrained")
    panels = figure.subplots(len(reports), sharex=True, squeeze=False)[:, 0]
    for panel, report in zip(panels, reports, strict=True):
        panel.hist(
            [np.minimum(lengths, stop) for lengths in report.lengths.values()],
            bins=60,
            range=(0, stop),
            stacked=True,
            color=[colour(domains.index(domain)) for domain in report.lengths],
            label=list(report.lengths),
        )
        panel.axvline(max_length, color="black", linewidth=1, linestyle="--")
        panel.set_title(f"{report.path.name}: {report.rows:,} rows, {_share(report.cut, report.rows)} cut", size=10)
        panel.set_ylabel("rows")
        panel.set_xlim(0, stop)
        panel.legend(fontsize=8, loc="upper right")
    panels[-1].set_xlabel(f"tokens (dashed: max_length {max_length}; the last bar holds all longer rows)")
    with files.replacing(path) as new:
        figure.savefig(new, format=path.suffix[1:], dpi=150)
