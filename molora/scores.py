"""What models scored on held-out rows: row by row, by group, and as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.markup import escape
from rich.table import Table

from molora.answers import wilson_interval
from molora.folders import short_names

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
    seconds: float = 0.0
    """What measuring took, over all goes if there were several."""

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
            "seconds": self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """The summary and the rows; :meth:`from_json` reads them back."""
        return self.summary() | {"rows": [asdict(row) for row in self.rows]}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> BenchResult:
        """The inverse of :meth:`to_json`. Raises KeyError or TypeError for anything else."""
        rows = tuple(Score(**row | {"groups": tuple(row["groups"])}) for row in tree["rows"])
        numbers = (tree["loss_tokens_per_second"], tree["generated_tokens_per_second"], tree["seconds"])
        return BenchResult(rows, *numbers)

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


# --- differences -------------------------------------------------------------------------------------------------

FEWEST_ROWS = 6
"""Of fewer, all changing in one direction would be chance in more than 5 % of cases (2 / 2^rows, the sign test), while
draws from them differ too little to show it: those of one row not at all."""
RESAMPLES = 10_000
METHOD = (
    f"paired bootstrap over the bench's rows, {RESAMPLES:,} resamples with a fixed seed, percentile interval of 95 %, "
    "two-sided p, not corrected for the number of comparisons"
)

Runs = Sequence[BenchResult]
"""What is compared: one result, or those of several seeds, whose rows are averaged before rows are drawn."""
Measure = Literal["loss", "exact_match"]


@dataclass(frozen=True)
class Difference:
    """By how much one model's number is above another's on the same rows, and how sure that is (:data:`METHOD`).

    The rows are what is drawn, so the interval is about other rows of the same kind; it knows nothing of how a model
    trained with another seed would have done.
    """

    value: float
    interval_95: tuple[float, float]
    p: float
    rows: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves zero out, over :data:`FEWEST_ROWS` or more; one that is no number (a broken
        model) does not."""
        low, high = self.interval_95
        return self.rows >= FEWEST_ROWS and (low > 0 or high < 0)


def difference(
    before: Runs, after: Runs, group: str = ALL, measure: Measure = "loss", *, relative: bool = False
) -> Difference | None:
    """``after`` minus ``before`` in loss per token or in exact match, over the rows of ``group`` that all measured.

    With ``relative`` as a share of ``before``. None where there are no such rows. Raises ValueError for results that
    are not of the same bench.
    """
    if len({len(result.rows) for result in (*before, *after)}) > 1:
        raise ValueError("results of different benches cannot be compared")
    columns = [_sums(runs, group, measure) for runs in (before, after)]
    used = (columns[0][:, 1] > 0) & (columns[1][:, 1] > 0)
    table = np.concatenate(columns, axis=1)[used]
    if not len(table):
        return None

    def statistic(sums: np.ndarray) -> np.ndarray:
        old, new = sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]
        if not relative:
            return new - old
        # A model that is at zero cannot get better or worse by a share of that.
        return np.divide(new - old, old, out=np.zeros_like(old), where=old != 0)

    drawn = np.concatenate([statistic(sums) for sums in _resample(table)])
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    beyond = min((~(drawn > 0)).sum(), (~(drawn < 0)).sum())  # a draw that is no number speaks for neither side
    p = min(1.0, 2 * float(beyond + 1) / (len(drawn) + 1))
    return Difference(float(statistic(table.sum(axis=0))), (low, high), p, len(table))


def differences(before: Runs, after: Runs) -> dict[str, dict[str, Any]]:
    """Every difference that there is, as plain data: group -> measure -> value, interval, p and rows."""
    found: dict[str, dict[str, Any]] = {}
    for group in before[0].groups():
        for measure in ("loss", "exact_match"):
            if (change := difference(before, after, group, measure)) is not None:
                found.setdefault(group, {})[measure] = asdict(change) | {"significant": change.significant}
    return found


def _sums(runs: Runs, group: str, measure: Measure) -> np.ndarray:
    """(rows, 2): numerator and denominator of the measure, averaged over runs; 0 where a row is not of the group or
    some run did not measure it."""

    def of(row: Score) -> tuple[float, float]:
        if group not in row.groups:
            return 0.0, 0.0
        if measure == "loss":
            return row.loss, float(row.tokens)
        return (0.0, 0.0) if row.correct is None else (float(row.correct), 1.0)

    table = np.array([[of(row) for row in run.rows] for run in runs])
    everywhere = (table[:, :, 1:] > 0).all(axis=0)
    return table.mean(axis=0) * everywhere


def _resample(table: np.ndarray, chunk: int = 500) -> Iterator[np.ndarray]:
    """Column sums of ``table`` (n, c) over n rows drawn with replacement, :data:`RESAMPLES` times: (chunk, c) each."""
    draw = np.random.default_rng(0)
    for _ in range(0, RESAMPLES, chunk):
        yield table[draw.integers(len(table), size=(chunk, len(table)))].sum(axis=1)


# --- tables ------------------------------------------------------------------------------------------------------


def comparison(results: Results, baseline: str, title: str) -> Table:
    """A row per bench, group and model, with each model's difference from ``baseline``; a star marks significance."""
    made = Table(
        title=title,
        title_justify="left",
        caption=f"Δ: {METHOD}; * the interval leaves 0 out, of {FEWEST_ROWS} rows or more",
    )
    made.caption_justify = "left"
    made.add_column("group", no_wrap=True)
    made.add_column("model", overflow="fold")
    for heading in ("loss", "perplexity", "Δ loss (95 %)", "pass@1 (95 %)", "Δ points (95 %)"):
        made.add_column(heading, justify="right", overflow="fold")
    called = {model: name for name, model in short_names(list(results)).items()}
    names = [Path(bench).name for bench in results[baseline]]
    for bench, base in results[baseline].items():
        name = Path(bench).name
        made.add_row(f"[bold]{escape(name if names.count(name) == 1 else bench)}")
        for group in base.groups():
            for n, (model, benches) in enumerate(results.items()):
                result = benches[bench]
                losses, matches = (
                    None if model == baseline else difference([base], [result], group, measure)
                    for measure in ("loss", "exact_match")
                )
                made.add_row(
                    escape(group) if n == 0 else "",
                    escape(called[model]),
                    loss_cell(result.loss(group)),
                    "" if (loss := result.loss(group)) is None else f"{perplexity(loss):.4g}",
                    difference_cell(losses),
                    match_cell(result.exact_match(group)),
                    difference_cell(matches, points=True),
                    end_section=n == len(results) - 1,
                )
    return made


def columns(results: Results, title: str) -> Table:
    """A column per model, a row per measure; exact match with its 95 % interval."""
    made = Table(title=title, title_justify="left")
    made.add_column("", no_wrap=True)
    for name in short_names(list(results)):
        made.add_column(escape(name), justify="right", overflow="fold")
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


def difference_cell(found: Difference | None, *, points: bool = False) -> str:
    """A difference with its interval and a star where it is significant; ``points``: of shares, in per cent."""
    if found is None:
        return ""
    scale, form = (100, "+.1f") if points else (1, "+.4f")
    low, high = (format(scale * end, form) for end in found.interval_95)
    return f"{scale * found.value:{form}} ({low} to {high}){'*' if found.significant else ''}"
