"""What two stages did to a model, in words: base, stage 1 and stage 2 on a general and on a maths bench.

    python -m molora.verdict outputs/bench_stage1.json outputs/bench_stage2.json       # what molora.evaluate wrote
    python -m molora.verdict --model base --model outputs/…/stage1/final --model outputs/…/stage2/final \\
        --bench general.bench.jsonl --bench maths.bench.jsonl                           # measures what is missing first

The models are base, stage 1 and stage 2 in that order. The maths bench is the one whose rows have answers to compare.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from molora import cli, evaluate
from molora.errors import UserError
from molora.files import check_target, write_text
from molora.scores import ALL, METHOD, BenchResult, Difference, Measure, Results, Runs, columns, difference

ACQUIRED, KEPT, SLIGHTLY = 0.02, 0.02, 0.05
"""Relative changes of the general loss per token. Stage 1: *acquired* if it fell by at least the first. Stage 2: *kept*
if it rose by at most the second, *slightly declined* up to the third, *sharply declined* beyond."""
THRESHOLDS = (
    f"general ability: acquired where its loss falls by {ACQUIRED:.0%} or more; kept where it rises by at most "
    f"{KEPT:.0%}, slightly declined up to {SLIGHTLY:.0%}, sharply declined beyond; maths: acquired, or lost, where the "
    f"95 % interval of its change leaves 0 out; {METHOD}"
)


@dataclass(frozen=True)
class Verdict:
    """Which of the recipe's expected patterns two stages show."""

    general_after_stage1: str
    """``acquired`` or ``not acquired``"""
    maths_after_stage2: str
    """``acquired``, ``not acquired`` or ``lost``, against base"""
    general_after_stage2: str
    """``kept``, ``slightly declined`` or ``sharply declined``, against stage 1"""
    overfit: bool
    """Overfit to maths: maths acquired, general sharply declined."""
    general1: Difference
    """General loss from base to stage 1, as a share of base's."""
    general2: Difference
    """General loss from stage 1 to stage 2, as a share of stage 1's."""
    maths: Difference
    """From base to stage 2: exact match, or the loss as a share of base's where the bench has no answers."""
    sentences: tuple[str, ...]
    """The same in words, with what to do about it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"thresholds": THRESHOLDS}


def judge(general: Sequence[Runs], maths: Sequence[Runs]) -> Verdict:
    """Judge base, stage 1 and stage 2, each given by its results on the two benches (several for several seeds).

    Raises :class:`UserError` for benches without loss, and for a loss that is not finite.
    """
    measure: Measure = "exact_match" if maths[0][0].exact_match() else "loss"
    general1 = _change(general[0], general[1], "general")
    general2 = _change(general[1], general[2], "general")
    learnt = _change(maths[0], maths[2], "maths", measure)
    first = "acquired" if round(general1.value, 9) <= -ACQUIRED else "not acquired"
    second = _kept(general2.value)
    better = learnt.value > 0 if measure == "exact_match" else learnt.value < 0
    added = "not acquired" if not learnt.significant else "acquired" if better else "lost"
    overfit = added == "acquired" and second == "sharply declined"

    what = "exact match" if measure == "exact_match" else "loss"
    told = [
        f"Stage 1: general ability {first} (loss {_percent(general1)} against base).",
        f"Stage 2: maths {added} ({_from_to(maths, measure)} {what} from base to stage 2, "
        f"{_points(learnt) if measure == 'exact_match' else _percent(learnt)}), "
        f"general ability {second} (loss {_percent(general2)} against stage 1).",
    ]
    if overfit:
        told.append("That is overfitting to maths: train stage 2 for fewer steps, or with a lower lr.")
    elif second == "sharply declined":
        told.append("Stage 2 took general ability and gave no maths for it: lower its lr, and look at its data.")
    elif added != "acquired":
        told.append("Stage 2 has not taught maths yet: train it for more steps, or with a higher lr.")
    ends = {_kept(end) for end in general2.interval_95}
    if len(ends) > 1:
        told.append(
            f"The interval of the general change reaches from {_kept(general2.interval_95[0])} to "
            f"{_kept(general2.interval_95[1])}: a larger bench would tell."
        )
    return Verdict(first, added, second, overfit, general1, general2, learnt, tuple(told))


def judge_results(results: Results, general: str, maths: str) -> Verdict:
    """:func:`judge` for three models in a table of results. Raises :class:`UserError` if they are not three."""
    _check_three(results)
    return judge(*([[benches[bench]] for benches in results.values()] for bench in (general, maths)))


def _check_three(models: Collection[str]) -> None:
    if len(models) != 3:
        raise UserError(f"a verdict needs three models, base, stage 1 and stage 2; here are {', '.join(models)}")


def _kept(change: float) -> str:
    # Rounded, so that a change of exactly a threshold is on its near side whatever the last bit says.
    change = round(change, 9)
    return "kept" if change <= KEPT else "slightly declined" if change <= SLIGHTLY else "sharply declined"


def _change(before: Runs, after: Runs, bench: str, measure: Measure = "loss") -> Difference:
    found = difference(before, after, ALL, measure, relative=measure == "loss")
    if found is None:
        raise UserError(f"the {bench} bench has no rows whose {measure.replace('_', ' ')} all models measured")
    if not math.isfinite(found.value):
        raise UserError(
            f"the {bench} bench: a model's loss is not finite, so there is nothing to judge; look at its run"
        )
    return found


def _from_to(maths: Sequence[Runs], measure: Measure) -> str:
    def mean(runs: Runs) -> str:
        if measure == "loss":
            return f"{sum(run.loss() or 0 for run in runs) / len(runs):.3f}"
        matches = [run.exact_match() or (0, 1) for run in runs]
        return f"{sum(correct / asked for correct, asked in matches) / len(matches):.0%}"

    return f"{mean(maths[0])} to {mean(maths[2])}"


def _percent(change: Difference) -> str:
    shares = (round(share, 3) + 0.0 for share in (change.value, *change.interval_95))  # no -0.0%
    return "{:+.1%}, 95 % interval {:+.1%} to {:+.1%}".format(*shares)


def _points(change: Difference) -> str:
    low, high = change.interval_95
    return f"{100 * change.value:+.0f} points, 95 % interval {100 * low:+.0f} to {100 * high:+.0f}"


# --- command line ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` default to the process's own. Raises :class:`UserError` for bad input."""
    options = _parse(arguments)
    if bool(options.results) == bool(options.model):
        raise UserError("give files of results, or three times --model with --bench, and not both")
    if options.output:
        check_target(options.output, [*options.results, *options.bench])
    if options.model:
        _check_three(dict.fromkeys(options.model))  # before they are measured
    results = read_results(options.results) if options.results else evaluate.measured(options)
    general, maths = _benches(results, options)
    shown = {name: {"general": of[general], "maths": of[maths]} for name, of in results.items()}
    verdict = judge_results(shown, "general", "maths")
    if options.output:
        write_text(options.output, json.dumps(verdict.to_json(), indent=1, ensure_ascii=False) + "\n")
    console = Console()
    console.print(columns(shown, "held-out rows; loss per token; exact match with 95 % interval"))
    console.print(*verdict.sentences, f"({THRESHOLDS})", sep="\n", highlight=False)


def read_results(paths: Sequence[Path]) -> dict[str, dict[str, BenchResult]]:
    """model -> bench -> result from files that ``molora.evaluate --output`` wrote, in their order.

    Raises :class:`UserError` for a file that is none of these, and for a bench whose rows are not the same in all.
    """
    results: dict[str, dict[str, BenchResult]] = {}
    measured: dict[str, tuple[Any, Path]] = {}
    for path in paths:
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            read = [(entry["model"], entry["bench"], BenchResult.from_json(entry)) for entry in tree["results"]]
            hashes = {bench: tree["provenance"]["data"][bench] for _, bench, _ in read}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not results of python -m molora.evaluate --output ({error!r})") from error
        for model, bench, result in read:
            rows = (hashes[bench], len(result.rows))
            known, where = measured.setdefault(bench, (rows, path))
            if rows != known:
                raise UserError(
                    f"{path}: {bench} is of other rows than in {where} (the file changed, or --limit is another); "
                    "measure all models on the same rows"
                )
            results.setdefault(model, {})[bench] = result
    return results


def _benches(results: Results, options: argparse.Namespace) -> tuple[str, str]:
    """(general, maths): as named by the options, else told apart by which has answers to compare."""
    names = list(dict.fromkeys(bench for benches in results.values() for bench in benches))
    everywhere = [bench for bench in names if all(bench in benches for benches in results.values())]
    chosen = []
    for wanted, answers in ((options.general, False), (options.maths, True)):
        fitting = [
            bench
            for bench in everywhere
            if (bench == wanted if wanted else bool(next(iter(results.values()))[bench].exact_match()) == answers)
        ]
        option = "--maths" if answers else "--general"
        if len(fitting) != 1:
            raise UserError(
                f"{option}: which bench? name one that all models were measured on: {', '.join(everywhere) or 'none'}"
            )
        chosen.append(fitting[0])
    return chosen[0], chosen[1]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m molora.verdict",
        description="Say what two stages did to a model, from results of molora.evaluate or from models and benches.",
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS.json", help="written by molora.evaluate")
    parser.add_argument("--general", metavar="BENCH", help="general bench (default: the one without answers)")
    parser.add_argument("--maths", metavar="BENCH", help="maths bench (default: the one with answers)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the verdict and its numbers")
    evaluate.add_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run(main)
