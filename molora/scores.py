"""What models scored on held-out rows: row by row, by group, and as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from molora.answers import wilson_interval

ALL = "all"
"""The group of all rows, where a bench has several domains."""


@dataclass(frozen=True)
class Score:
    """One row of a bench as one model did it. Kept, so that models can be compared row by row."""

    groups: tuple[str, ...]
    loss: float = 0.0
    """Sum over ``tokens`` of the next-token loss, in nats."""
    tokens: int = 0
    """Tokens of the answer that have a loss; 0 for a row whose loss was not measured."""
    prediction: str | None = None
    """What the model answered; None for a row without ``answer``."""
    correct: bool | None = None


@dataclass(frozen=True)
class BenchResult:
    """One model on one bench. Loss and exact match are asked for by group, see :func:`groups_of`."""

    rows: tuple[Score, ...]
    loss_tokens_per_second: float | None
    """Tokens read for the loss, those of the prompts too, per second of wall time; None if no row had a loss."""
    generated_tokens_per_second: float | None
    """Tokens written per second of wall time, which includes reading the prompts; None if nothing was generated."""

    def groups(self) -> list[str]:
        """The groups in order of appearance, those of which another one has the same rows left out."""
        members: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            for group in row.groups:
                members.setdefault(group, []).append(i)
        finest = {tuple(rows): group for group, rows in members.items()}  # a later, finer name wins
        return [group for group, rows in members.items() if finest[tuple(rows)] == group]

    def loss(self, group: str = ALL) -> float | None:
        """Mean loss per answer token, in nats; None for a group that has none."""
        rows = self._of(group)
        tokens = sum(row.tokens for row in rows)
        return sum(row.loss for row in rows) / tokens if tokens else None

    def exact_match(self, group: str = ALL) -> tuple[int, int] | None:
        """(correct, asked); None for a group without answers."""
        asked = [row.correct for row in self._of(group) if row.correct is not None]
        return (sum(asked), len(asked)) if asked else None

    def summary(self) -> dict[str, Any]:
        """Everything but the single rows, as plain data for JSON."""
        groups = {}
        for group in self.groups():
            loss, match = self.loss(group), self.exact_match(group)
            entry: dict[str, Any] = {"rows": len(self._of(group))}
            if loss is not None:
                entry |= {"tokens": sum(row.tokens for row in self._of(group)), "loss": loss}
                entry |= {"perplexity": perplexity(loss)}
            if match is not None:
                entry |= {"correct": match[0], "asked": match[1], "exact_match": match[0] / match[1]}
                entry |= {"exact_match_interval_95": list(wilson_interval(*match))}
            groups[group] = entry
        return {
            "groups": groups,
            "loss_tokens_per_second": self.loss_tokens_per_second,
            "generated_tokens_per_second": self.generated_tokens_per_second,
        }

    def to_json(self) -> dict[str, Any]:
        """The summary and the rows; :meth:`from_json` reads them back."""
        return self.summary() | {"rows": [asdict(row) for row in self.rows]}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> BenchResult:
        """The inverse of :meth:`to_json`. Raises KeyError or TypeError for anything else."""
        rows = tuple(Score(**row | {"groups": tuple(row["groups"])}) for row in tree["rows"])
        return BenchResult(rows, tree["loss_tokens_per_second"], tree["generated_tokens_per_second"])

    def _of(self, group: str) -> list[Score]:
        return [row for row in self.rows if group in row.groups]


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is more than a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def groups_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The groups that a row counts in: all, its domain, and its domain's language and task where it names them."""
    domain = str(row.get("domain", ALL))
    finer = [f"{domain}/{row[key]}" for key in ("language", "task") if isinstance(row.get(key), str)]
    return tuple(dict.fromkeys((ALL, domain, *finer)))


Results = Mapping[str, Mapping[str, BenchResult]]
"""model -> bench -> result, every model on the same benches."""


# --- tables ------------------------------------------------------------------------------------------------------


def table(results: Sequence[tuple[str, str, BenchResult]]) -> Table:
    """Results as (model, bench, result), as one table with a row per bench, group and model."""
    made = Table(title="held-out loss and exact match (95 % interval)", title_justify="left")
    made.add_column("group", no_wrap=True)
    made.add_column("model", overflow="fold")
    for heading in ("loss", "perplexity", "exact match", "read tok/s", "written tok/s"):
        made.add_column(heading, justify="right")
    for bench in dict.fromkeys(bench for _, bench, _ in results):
        here = [(model, result) for model, name, result in results if name == bench]
        made.add_row(f"[bold]{escape(Path(bench).name)}")
        for group in here[0][1].groups():
            for n, (model, result) in enumerate(here):
                made.add_row(
                    escape(group) if n == 0 else "",
                    escape(model),
                    loss_cell(result.loss(group)),
                    "" if (loss := result.loss(group)) is None else f"{perplexity(loss):.4g}",
                    match_cell(result.exact_match(group)),
                    speed_cell(result.loss_tokens_per_second),
                    speed_cell(result.generated_tokens_per_second),
                    end_section=n == len(here) - 1,
                )
    return made


def columns(results: Results, title: str) -> Table:
    """A column per model, a row per measure; exact match with its 95 % interval."""
    made = Table(title=title, title_justify="left")
    made.add_column("", no_wrap=True)
    for model in results:
        made.add_column(escape(model), justify="right")
    first = next(iter(results.values()))
    for bench, result in first.items():
        found = [benches[bench] for benches in results.values()]
        for i, group in enumerate(result.groups()):
            name = f"{bench} loss" if i == 0 else f"  {group}"
            made.add_row(escape(name), *(loss_cell(column.loss(group)) for column in found))
        asked = [group for group in result.groups() if result.exact_match(group)]
        for i, group in enumerate(asked):
            name = f"{bench} exact match" if i == 0 else f"  {group}"
            made.add_row(escape(name), *(match_cell(column.exact_match(group)) for column in found))
        made.add_row("  read, tokens/s", *(speed_cell(column.loss_tokens_per_second) for column in found))
        if asked:
            made.add_row("  written, tokens/s", *(speed_cell(column.generated_tokens_per_second) for column in found))
        made.add_section()
    return made


def loss_cell(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def match_cell(match: tuple[int, int] | None) -> str:
    """Exact match of (correct, asked) in per cent, with its 95 % interval."""
    if match is None:
        return ""
    low, high = wilson_interval(*match)
    return f"{100 * match[0] / match[1]:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def speed_cell(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f"{tokens_per_second:,.0f}"
