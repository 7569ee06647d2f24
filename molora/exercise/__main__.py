"""The recipe's exercise: two stages against one stage on the mixed data, and against a plain LoRA, with equal tokens.

    python -m molora.exercise                          # the quickstart's model, presets and benches, one seed
    python -m molora.exercise --seeds 42 43 44

Three ways to spend the same tokens on the same model:

    mixture, two stages    both presets as they are
    mixture, one stage     the first preset on the very rows that the two stages read, shuffled together
    one LoRA, two stages   both presets with injection.strategy: dense_lora, of the rank that gives it as many trainable
                           parameters as the mixture has; phases for the router alone go, as there is none

What is done already is not done again (:mod:`molora.pipeline`).

    <out>/<way>/seed-<seed>/<stage>/                 the runs, as molora.train writes them
    <out>/exercise.md, exercise.json, exercise.png   the comparison
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from molora import cli, provenance, quickstart
from molora.config import Config
from molora.config import Data as DataConfig
from molora.data import read_rows
from molora.exercise.comparison import GENERAL, MATHS, Comparison, Trained, draw, page
from molora.exercise.plan import TWO, WAYS, Plan, plan
from molora.files import file_sha256, write_text
from molora.pipeline import Bench, Pipeline, training_seconds, training_tokens
from molora.scores import METHOD, BenchResult, differences


def carry_out(
    plans: Mapping[int, Plan], benches: Mapping[str, Bench], pipeline: Pipeline
) -> tuple[dict[str, BenchResult], dict[str, Trained]]:
    """Train and measure what is missing: (the base model's results, each way's)."""
    first = next(iter(plans.values()))
    base = pipeline.evaluated("base", first.model, benches)
    trained = {
        name: Trained(way, [{b: [] for b in benches} for _ in way.runs], [], []) for name, way in first.ways.items()
    }
    for one in plans.values():
        for name, way in one.ways.items():
            model: str | Path = one.model
            folders = []
            for run, stage in zip(way.runs, trained[name].stages, strict=True):
                model = pipeline.trained(run.name, run.preset, model, run.data, run.overrides)
                folders.append(model.parent)
                for bench, result in pipeline.evaluated(run.name, model, benches).items():
                    stage[bench].append(result)
            trained[name].tokens.append(sum(map(training_tokens, folders)))
            trained[name].seconds.append(sum(map(training_seconds, folders)))
    return base, trained


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` default to the process's own. Raises :class:`UserError` for bad input."""
    options = _parse(arguments)
    cli.require_positive(options, "max_new_tokens", "batch_size")
    pipeline = Pipeline(options.out)
    seeds = list(dict.fromkeys(options.seeds))
    benches = {
        GENERAL: Bench(options.general, {"batch_size": options.batch_size}),
        MATHS: Bench(options.maths, {"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens}),
    }
    for bench in benches.values():
        read_rows(bench.path)
    stages = [(options.preset_1, options.set_1), (options.preset_2, options.set_2)]
    plans = {seed: plan(stages, seed, options.out) for seed in seeds}
    _show_plan(plans[seeds[0]], len(seeds), pipeline)
    if options.dry_run:
        return
    base, ways = carry_out(plans, benches, pipeline)
    compared = Comparison(seeds, base, ways)
    tree = _tree(compared, plans[seeds[0]], options, pipeline)
    write_text(options.out / "exercise.json", json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    write_text(options.out / "exercise.md", page(compared, tree))
    draw(compared, options.out / "exercise.png")

    table = Table(title=f"equal tokens, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}", title_justify="left")
    for heading in ("", "base", *(WAYS[name] for name in ways)):
        table.add_column(heading, justify="right" if heading else "left")
    for label, cells in compared.table():
        table.add_row(escape(label), *map(escape, cells))
    pipeline.console.print(table)
    for told in compared.findings():
        pipeline.console.print(told.replace("**", ""), highlight=False)
    pipeline.console.print(f"written: {options.out / 'exercise.md'}, .json and .png", highlight=False, soft_wrap=True)


def _show_plan(one: Plan, seeds: int, pipeline: Pipeline) -> None:
    table = Table(title=f"the plan, for each of {seeds} seed{'s' if seeds > 1 else ''}", title_justify="left")
    for heading in ("", "trainable", "rank", "steps", "tokens"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, way in one.ways.items():
        table.add_row(WAYS[name], f"{way.trainable:,}", str(way.rank), str(way.steps), f"{way.tokens:,}")
    pipeline.console.print(table)


def _tree(compared: Comparison, one: Plan, options: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    ways = {}
    for name, trained in compared.ways.items():
        verdict = compared.verdict(name)
        ways[name] = {
            "name": WAYS[name],
            "trainable_parameters": trained.way.trainable,
            "rank": trained.way.rank,
            "optimizer_steps": trained.way.steps,
            "tokens": trained.tokens,
            "training_seconds": trained.seconds,
            "overrides": {run.name: run.overrides for run in trained.way.runs},
            "stages": [
                {bench: [result.summary() for result in results] for bench, results in stage.items()}
                for stage in trained.stages
            ],
            "verdict": verdict and verdict.to_json(),
        }
        if name != TWO:
            ways[name]["against_two_stages"] = {
                bench: differences(compared.ways[TWO].final(bench), trained.final(bench)) for bench in compared.base
            }
    files = [str(path) for path in (options.general, options.maths)]
    return {
        "model": one.model,
        "presets": [os.path.relpath(preset) for preset in (options.preset_1, options.preset_2)],
        "overrides": [options.set_1, options.set_2],
        "preset_sha256": [file_sha256(options.preset_1), file_sha256(options.preset_2)],
        "seeds": list(compared.seeds),
        "method": METHOD,
        "base": {bench: result.summary() for bench, result in compared.base.items()},
        "ways": ways,
        "seconds": pipeline.seconds,
        "provenance": provenance.collect(Config(data=DataConfig(path=files))),
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m molora.exercise",
        description="Two stages against one stage and against a plain LoRA, with equal tokens.",
    )
    presets = [quickstart.PRESETS / preset for preset, _ in quickstart.STAGES.values()]
    for n, preset in enumerate(presets, start=1):
        parser.add_argument(
            f"--preset-{n}", type=Path, default=preset, metavar="FILE", help=f"stage {n} (default: the quickstart's)"
        )
        parser.add_argument(
            f"--set-{n}", action="append", default=[], metavar="KEY.PATH=VALUE", help=f"override a key of stage {n}"
        )
    for name in (GENERAL, MATHS):
        bench = Path("data/quickstart") / f"{name}.bench.jsonl"
        parser.add_argument(
            f"--{name}", type=Path, default=bench, metavar="FILE", help=f"{name} bench (default: %(default)s)"
        )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], metavar="N", help="default: 42")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=48, metavar="N", help="of the benches (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/exercise"), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained, then stop")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run(main)
