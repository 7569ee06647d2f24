"""What the exercise found: a table, sentences, a page and a picture, all from the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.answers import wilson_interval
from molora.colours import colour
from molora.errors import UserError
from molora.exercise.plan import LORA, ONE, TWO, WAYS, Way
from molora.files import replacing
from molora.pipeline import clock
from molora.scores import METHOD, BenchResult, Difference, Measure, difference, difference_cell
from molora.verdict import THRESHOLDS, Verdict, judge

GENERAL, MATHS = "general", "maths"
"""The two benches."""
_LOSSES: tuple[tuple[str, Measure], ...] = ((GENERAL, "loss"), (MATHS, "loss"))
_MATCHES: tuple[tuple[str, Measure], ...] = ((MATHS, "exact_match"),)


@dataclass
class Trained:
    """What one way came to, over the seeds."""

    way: Way
    stages: list[dict[str, list[BenchResult]]]
    """For each run, bench -> results, one for each seed."""
    tokens: list[int]
    seconds: list[float]
    """By the logs of the runs, summed over the stages, one for each seed."""

    def final(self, bench: str) -> list[BenchResult]:
        return self.stages[-1][bench]


@dataclass(frozen=True)
class Comparison:
    """All that the table, the page and the picture show."""

    seeds: Sequence[int]
    base: dict[str, BenchResult]
    ways: dict[str, Trained]

    def verdict(self, name: str) -> Verdict | None:
        """That of a way with two stages."""
        way = self.ways[name]
        if len(way.stages) != 2:
            return None
        return judge(*([[self.base[b]], way.stages[0][b], way.stages[1][b]] for b in (GENERAL, MATHS)))  # type: ignore[arg-type]

    def against_two_stages(self, name: str, bench: str, measure: Measure) -> Difference | None:
        """By how much a way differs from the mixture in two stages on the whole of a bench."""
        if name == TWO:
            return None
        return difference(self.ways[TWO].final(bench), self.ways[name].final(bench), measure=measure)

    def table(self) -> list[tuple[str, list[str]]]:
        """Rows of (label, a cell for the base and for each way)."""
        ways = list(self.ways.values())
        rows = [
            ("trainable parameters", ["", *(f"{way.way.trainable:,}" for way in ways)]),
            ("rank", ["", *(str(way.way.rank) for way in ways)]),
            ("optimizer steps", ["", *(str(way.way.steps) for way in ways)]),
            ("tokens read", ["", *(f"{sum(way.tokens) / len(way.tokens):,.0f}" for way in ways)]),
        ]
        for bench, measure in (*_LOSSES, *_MATCHES):
            cell = _losses if measure == "loss" else _matches
            for i, group in enumerate(self.base[bench].groups()):
                columns = [[self.base[bench]], *(way.final(bench) for way in ways)]
                cells = [cell(results, group) for results in columns]
                if any(cells):
                    rows.append((f"{bench} {measure.replace('_', ' ')}" if i == 0 else f"· {group}", cells))
            changes = [self.against_two_stages(name, bench, measure) for name in self.ways]
            if any(changes):
                points = measure == "exact_match"
                unit = ", points" if points else ""
                cells = [difference_cell(change, points=points) for change in changes]
                rows.append((f"· against two stages{unit}", ["", *cells]))
        return rows

    def findings(self) -> list[str]:
        """Sentences: what the numbers say, and where they say nothing."""
        told = []
        for name in (ONE, LORA):
            changes = []
            for bench, measure in (_LOSSES[0], *_MATCHES):
                if (change := self.against_two_stages(name, bench, measure)) is None:
                    continue
                what = f"{bench} {measure.replace('_', ' ')}"
                cell = difference_cell(change, points=measure == "exact_match").removesuffix("*")
                better = (change.value < 0) == (measure == "loss")
                said = ("better" if better else "worse") if change.significant else "no difference that these rows show"
                changes.append(f"{what} {cell}{' points' if measure == 'exact_match' else ''}: {said}")
            told.append(f"**{WAYS[name]}** against {WAYS[TWO]}: {'; '.join(changes)}.")
        for name in self.ways:
            if verdict := self.verdict(name):
                told.append(f"**{WAYS[name]}**: {' '.join(verdict.sentences)}")
        return told


def _losses(results: Sequence[BenchResult], group: str) -> str:
    found = [loss for result in results if (loss := result.loss(group)) is not None]
    return _over_seeds(found, ".3f") if found else ""


def _matches(results: Sequence[BenchResult], group: str) -> str:
    found = [match for result in results if (match := result.exact_match(group)) is not None]
    if not found:
        return ""
    if len(found) == 1:
        low, high = wilson_interval(*found[0])
        return f"{found[0][0] / found[0][1]:.0%} ({low:.0%} to {high:.0%})"
    return _over_seeds([correct / asked for correct, asked in found], ".0%")


def _over_seeds(values: Sequence[float], form: str) -> str:
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


# --- page --------------------------------------------------------------------------------------------------------

_PAGE = """# Two stages or one, a mixture or one LoRA

Written by `python -m molora.exercise`; every number is in `exercise.json` beside this page.

The recipe trains in two stages. Its exercise asks whether one stage on the mixed data does as well. A plain LoRA is
the control that says whether the mixture of experts is worth having. All three ways start from `{model}` and read
the same number of tokens:

- **mixture, two stages**: {presets}.
- **mixture, one stage**: the first preset on the very rows that the two stages read, each as often, shuffled together,
  so that only order and schedule differ. Steps are whole: the tokens are equal to within half a step.
- **one LoRA, two stages**: the same rows in the same order with `dense_lora`, of the rank that comes closest to the
  mixture's trainable parameters, alpha / r as there. It has no router: the first steps, in which the mixture trains its
  router alone, train the LoRA.

{table}

{spread} Differences by {method}; `*`: the interval leaves 0 out.

![Each way's general loss and maths exact match](exercise.png)

## What this says

{findings}

Words by these thresholds: {thresholds}.

## How far it goes

- The benches are small: {general} general rows, {maths} of maths. The intervals are about other rows of the same kind,
  not about other seeds, other data or other models.
- Learning rates and numbers of steps were chosen for the mixture in two stages. The two others may do better with their
  own.
- The mixture has most of its parameters in the MLPs; one LoRA of the same size spreads them over all projections alike.
- Seeds: {seeds}. {hardware}, commit `{commit}`. Training of one seed took, by the logs: {times}.
"""


def page(compared: Comparison, made: Mapping[str, Any]) -> str:
    """The comparison in Markdown; ``made`` is what exercise.json says about how it was made."""
    heads = ["", "base", *(WAYS[name] for name in compared.ways)]
    table = [heads, ["---", *["---:"] * (len(heads) - 1)], *([label, *cells] for label, cells in compared.table())]
    count, origin = len(compared.seeds), made["provenance"]
    spread = (
        f"{count} seeds: mean, and from the lowest to the highest."
        if count > 1
        else "One seed, exact match with the 95 % interval over its rows: another seed gives other numbers, and "
        "nothing here says how far away."
    )
    times = [f"{WAYS[name]} {clock(sum(way.seconds) / count)}" for name, way in compared.ways.items()]
    return _PAGE.format(
        model=made["model"],
        presets=" then ".join(
            f"`{preset}`" + (f" with `{', '.join(sets)}`" if sets else "")
            for preset, sets in zip(made["presets"], made["overrides"], strict=True)
        ),
        table="\n".join(f"| {' | '.join(row)} |" for row in table),
        spread=spread,
        method=METHOD,
        findings="\n".join(f"- {told}" for told in compared.findings()),
        thresholds=THRESHOLDS,
        general=len(compared.base[GENERAL].rows),
        maths=len(compared.base[MATHS].rows),
        seeds=", ".join(map(str, compared.seeds)),
        hardware=", ".join(origin["gpus"]) or f"{origin['threads']} threads on {origin['cpu']}",
        commit=(origin["commit"] or "unknown")[:7],
        times=", ".join(times),
    )


# --- picture -----------------------------------------------------------------------------------------------------


def draw(compared: Comparison, path: Path) -> None:
    """General loss and maths exact match of the base and each way: a dot a seed, a bar at their mean; to a PNG file.

    Raises :class:`UserError` if matplotlib is not installed or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs the package matplotlib: pip install matplotlib") from None
    colours = ("black", *map(colour, range(len(compared.ways))))
    labels = ["base", *(WAYS[name] for name in compared.ways)]
    figure = Figure(figsize=(9.5, 0.55 * len(labels) + 1.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    exact = compared.base[MATHS].exact_match() is not None
    for ax, bench, title in (
        (axes[0], GENERAL, "general loss per token (left is better)"),
        (axes[1], MATHS, "maths exact match (right is better)" if exact else "maths loss per token (left is better)"),
    ):
        of = [[compared.base[bench]], *(way.final(bench) for way in compared.ways.values())]
        for i, (results, ink) in enumerate(zip(of, colours, strict=True)):
            percent = bench == MATHS and exact
            values = [_value(result, percent) for result in results]
            if percent and len(results) == 1:  # with several seeds their spread is what there is to see
                low, high = wilson_interval(*(results[0].exact_match() or (0, 1)))
                ax.plot([low, high], [i, i], color=ink, linewidth=2, alpha=0.5)
            mean = sum(values) / len(values)
            ax.plot([mean, mean], [i - 0.25, i + 0.25], color=ink, linewidth=3, solid_capstyle="butt")
            ax.plot(values, [i] * len(values), "o", color=ink, markersize=6, markerfacecolor="white")
            text = f"{mean:.0%}" if percent else f"{mean:.3f}"
            ax.annotate(text, (mean, i - 0.3), ha="center", va="bottom", fontsize=9)
        ax.set_title(title, fontsize=10, loc="left")
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.margins(x=0.12)
        ax.spines[["top", "right"]].set_visible(False)
        if bench == MATHS and exact:
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.5, -0.7)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=120)


def _value(result: BenchResult, percent: bool) -> float:
    match = result.exact_match()
    return match[0] / match[1] if percent and match else result.loss() or 0.0
