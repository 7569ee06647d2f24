"""Both stages on a small real model, measured before, between and after, with a report at the end.

    python -m molora.prepare quickstart
    python -m molora.quickstart

What is done already is not done again (:mod:`molora.pipeline`), so a second run takes seconds.

    <out>/stage1/, stage2/          the runs, as molora.train writes them
    <out>/report.json, routing.png  the report
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molora import cli, provenance, report, routing
from molora.config import Config, Data, presets_folder
from molora.data import read_rows, spread
from molora.errors import UserError
from molora.evaluate import Opened, fingerprint, routing_counts
from molora.files import file_sha256, write_text
from molora.pipeline import Bench, Pipeline, clock
from molora.scores import BenchResult, columns
from molora.verdict import THRESHOLDS, judge_results

PRESETS = presets_folder() / "quickstart"
STAGES = {"stage1": ("stage1_general.yml", ("general",)), "stage2": ("stage2_maths.yml", ("maths", "general"))}
"""stage -> its preset and the data that it trains on. General rows return in stage 2: on maths alone the general loss
rose by 15 % within 60 steps, most of it at the first and the last token of an answer (docs/log.md)."""

SETTINGS: dict[str, dict[str, int]] = {
    "general": {"batch_size": 48},
    "maths": {"batch_size": 48, "loss_rows": 60, "max_new_tokens": 128},
}
"""bench -> how it is measured, see :func:`molora.evaluate.evaluate`. No worked answer of the bench needs more than 108
tokens; the base model would go on for as long as it may."""
ROUTING_ROWS = 60
"""Rows of each bench that the routing is shown for."""


@dataclass
class Quickstart:
    """The parts of the quickstart, in a pipeline of their own."""

    data: Path
    pipeline: Pipeline

    def run(self) -> None:
        """Do what is missing and write the report. Raises :class:`UserError` if data are missing or inputs changed."""
        train = [self.data / f"{domain}.train.jsonl" for _, domains in STAGES.values() for domain in domains]
        for path in (self.data / "model", *train, *self.benches.values()):
            if not path.exists():
                raise UserError(f"{path}: missing; make it with: python -m molora.prepare quickstart --out {self.data}")
        started = time.perf_counter()
        benches = {name: Bench(path, SETTINGS[name]) for name, path in self.benches.items()}
        model = self.data / "model"
        results = {"base": self.pipeline.evaluated("base", model, benches)}
        for stage, (preset, domains) in STAGES.items():
            data = [self.data / f"{domain}.train.jsonl" for domain in domains]
            model = self.pipeline.trained(stage, PRESETS / preset, model, data)
            results[stage] = self.pipeline.evaluated(stage, model, benches)
        names, counts = self.routed(model)
        self._report(results, names, counts, time.perf_counter() - started)

    @property
    def benches(self) -> dict[str, Path]:
        return {bench: self.data / f"{bench}.bench.jsonl" for bench in SETTINGS}

    def routed(self, folder: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Router names of the model in ``folder``, and counts (routers, experts) for each bench."""

        def measure() -> dict[str, Any]:
            opened = Opened(folder)
            counts = {
                bench: routing_counts(opened.model, opened.tokenizer, spread(read_rows(path), ROUTING_ROWS)).tolist()
                for bench, path in self.benches.items()
            }
            return {"names": routing.names(opened.model), "counts": counts}

        hashes = {bench: file_sha256(path) for bench, path in self.benches.items()}
        key = {"model": fingerprint(folder), "rows": ROUTING_ROWS} | hashes
        value = self.pipeline.measured("stage2: routing", key, measure)
        return value["names"], {bench: torch.tensor(counts) for bench, counts in value["counts"].items()}

    def _report(
        self,
        results: dict[str, dict[str, BenchResult]],
        names: list[str],
        counts: dict[str, torch.Tensor],
        elapsed: float,
    ) -> None:
        out, console, seconds = self.pipeline.out, self.pipeline.console, self.pipeline.seconds
        verdict = judge_results(results, "general", "maths")
        picture = out / "routing.png"
        title = "Share of answer tokens per expert after both stages (dotted: all experts equal)"
        report.draw_routing(names, counts, picture, title)
        tree = {
            "results": {
                name: {bench: result.summary() for bench, result in of.items()} for name, of in results.items()
            },
            "verdict": verdict.to_json(),
            "routing": {
                "routers": names,
                "share": {domain: report.shares(table).tolist() for domain, table in counts.items()},
            },
            "settings": SETTINGS | {"routing_rows": ROUTING_ROWS},
            "seconds": seconds,
            "provenance": provenance.collect(Config(data=Data(path=[str(path) for path in self.benches.values()]))),
        }
        write_text(out / "report.json", json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
        console.print()
        console.print(columns(results, "held-out rows; loss per token; exact match with 95 % interval"))
        console.print(*verdict.sentences, f"({THRESHOLDS})", sep="\n", highlight=False)
        console.print(
            f"{clock(elapsed)} now, {clock(sum(seconds.values()))} for all parts. "
            f"Report: {out / 'report.json'}, picture: {picture}",
            highlight=False,
            soft_wrap=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` default to the process's own. Raises :class:`UserError` for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m molora.quickstart",
        description="Train both stages on a small real model, measure before, between and after, and report.",
    )
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    Quickstart(options.data, Pipeline(options.out)).run()


if __name__ == "__main__":
    cli.run(main)
