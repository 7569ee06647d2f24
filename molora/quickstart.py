"""Both stages on a small real model, measured before, between and after, with a report at the end.

    python -m molora.prepare quickstart
    python -m molora.quickstart

What is done already is not done again: a trained stage has its ``final`` folder, an interrupted one goes on from its
last checkpoint, and every measurement lies in a file that names what it was made of. So a second run takes seconds.

    <out>/stage1/, stage2/          the runs, as molora.train writes them
    <out>/<stage>.inputs.json       what a stage was trained from
    <out>/measured/<part>.json      one measurement each, with every prediction
    <out>/report.json, routing.png  the report
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from molora import checkpoint, cli, metrics, provenance, report, routing, scores, train
from molora.adapter import load
from molora.config import Config, Data
from molora.data import read_rows
from molora.errors import UserError
from molora.evaluate import evaluate, routing_counts
from molora.files import file_sha256, write_text
from molora.scores import BenchResult
from molora.verdict import judge

PRESETS = Path(__file__).parent.parent / "configs" / "presets" / "quickstart"
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
MEASUREMENT = 1
"""Raised with every change of this code that changes what is measured, so that older measurements are made again."""


@dataclass
class Quickstart:
    """One output folder, brought up to date part by part."""

    data: Path
    out: Path
    console: Console = field(default_factory=Console)
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part took when it was done, in this run or an earlier one."""

    def run(self) -> None:
        """Do what is missing and write the report. Raises :class:`UserError` if data are missing or inputs changed."""
        missing = [path for path in self._inputs() if not path.exists()]
        if missing:
            raise UserError(
                f"{missing[0]}: missing; make it with: python -m molora.prepare quickstart --out {self.data}"
            )
        started = time.perf_counter()
        model = self.data / "model"
        results = {"base": self.evaluated("base", model)}
        for stage in STAGES:
            model = self.trained(stage, model)
            results[stage] = self.evaluated(stage, model)
        names, counts = self.routed(model)
        self._report(results, names, counts, time.perf_counter() - started)

    # --- the parts -----------------------------------------------------------------------------------------------

    def trained(self, stage: str, model: Path) -> Path:
        """Train ``stage`` from the folder ``model``, or finish it, or find it finished; returns its ``final``."""
        preset, domains = STAGES[stage]
        data, output = [self.data / f"{domain}.train.jsonl" for domain in domains], self.out / stage
        inputs = {
            "preset": file_sha256(PRESETS / preset),
            "data": [file_sha256(path) for path in data],
            "model": fingerprint(model),
        }
        note = self.out / f"{stage}.inputs.json"
        if output.is_dir() and _read_json(note) != inputs:
            raise UserError(
                f"{output}: was trained from another model, preset or data than now; remove {self.out} to start again, "
                "or give another --out"
            )
        title = f"{stage}: train on {domains[0]}"
        if checkpoint.finished(output):
            self.console.print(f"{title}: done already", highlight=False)
        else:
            write_text(note, json.dumps(inputs, indent=1) + "\n")
            with self._part(title):
                train.main(
                    [
                        *("--preset", str(PRESETS / preset), "--output-dir", str(output), "--resume"),
                        *("--set", f"model_name={json.dumps(str(model))}"),
                        *("--set", f"data.path={json.dumps([str(path) for path in data])}"),
                    ]
                )
        # From the log and not from a clock, because an interrupted stage was trained in several goes.
        self.seconds[title] = _training_seconds(output)
        return output / checkpoint.FINAL

    def evaluated(self, name: str, folder: Path) -> dict[str, BenchResult]:
        """The model in ``folder`` on every bench."""
        loaded = Loaded(folder)
        found = {}
        for bench in SETTINGS:
            path = self.data / f"{bench}.bench.jsonl"

            def measure(bench: str = bench, path: Path = path) -> dict[str, Any]:
                rows = read_rows(path)
                return evaluate(
                    loaded.model, loaded.tokenizer, rows, **SETTINGS[bench], title=f"{name}, {bench}"
                ).to_json()

            key = {"model": fingerprint(folder), "bench": file_sha256(path)} | SETTINGS[bench]
            found[bench] = BenchResult.from_json(self._measured(f"{name}: evaluate on {bench}", key, measure))
        return found

    def routed(self, folder: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Router names of the model in ``folder``, and counts (routers, experts) for each bench."""

        def measure() -> dict[str, Any]:
            loaded = Loaded(folder)
            rows = {bench: read_rows(self.data / f"{bench}.bench.jsonl") for bench in SETTINGS}
            counts = {
                bench: routing_counts(loaded.model, loaded.tokenizer, _spread(rows[bench], ROUTING_ROWS)).tolist()
                for bench in SETTINGS
            }
            return {"names": routing.names(loaded.model), "counts": counts}

        benches = {bench: file_sha256(self.data / f"{bench}.bench.jsonl") for bench in SETTINGS}
        key = {"model": fingerprint(folder), "rows": ROUTING_ROWS} | benches
        value = self._measured("stage2: routing", key, measure)
        return value["names"], {bench: torch.tensor(counts) for bench, counts in value["counts"].items()}

    def _report(
        self,
        results: dict[str, dict[str, BenchResult]],
        names: list[str],
        counts: dict[str, torch.Tensor],
        elapsed: float,
    ) -> None:
        losses = [result["general"].loss() for result in results.values()]
        matches = [result["maths"].exact_match() for result in results.values()]
        verdict = judge(losses, matches)  # type: ignore[arg-type] # both are there: rows were measured
        picture = self.out / "routing.png"
        title = "Share of answer tokens per expert after both stages (dotted: all experts equal)"
        report.draw_routing(names, counts, picture, title)
        tree = {
            "results": {
                name: {bench: result.summary() for bench, result in of.items()} for name, of in results.items()
            },
            "verdict": asdict(verdict),
            "routing": {
                "routers": names,
                "share": {domain: report.shares(table).tolist() for domain, table in counts.items()},
            },
            "settings": SETTINGS | {"routing_rows": ROUTING_ROWS},
            "seconds": self.seconds,
            "provenance": provenance.collect(Config(data=Data(path=[str(path) for path in self._benches()]))),
        }
        write_text(self.out / "report.json", json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
        self.console.print()
        self.console.print(scores.columns(results, "held-out rows; loss per token; exact match with 95 % interval"))
        self.console.print(verdict.sentence, highlight=False)
        self.console.print(
            f"{_clock(elapsed)} now, {_clock(sum(self.seconds.values()))} for all parts. "
            f"Report: {self.out / 'report.json'}, picture: {picture}",
            highlight=False,
            soft_wrap=True,
        )

    # --- what makes a second run short ---------------------------------------------------------------------------

    def _measured(self, title: str, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The value that a file holds if it was measured under the same ``key``, else a new one, kept in that file."""
        key = key | {"measurement": MEASUREMENT}
        path = self.out / "measured" / (title.replace(": ", "-").replace(" ", "-") + ".json")
        kept = _read_json(path)
        if kept is not None and kept.get("key") == key:
            self.console.print(f"{title}: done already", highlight=False)
        else:
            with self._part(title):
                value = measure()
            kept = {"key": key, "seconds": self.seconds[title], "value": value}
            write_text(path, json.dumps(kept, ensure_ascii=False) + "\n")
        self.seconds[title] = kept["seconds"]
        return kept["value"]

    @contextmanager
    def _part(self, title: str) -> Iterator[None]:
        self.console.print(f"{title} …", highlight=False)
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started
        self.console.print(f"{title}: {_clock(self.seconds[title])}", highlight=False)

    def _benches(self) -> list[Path]:
        return [self.data / f"{bench}.bench.jsonl" for bench in SETTINGS]

    def _inputs(self) -> list[Path]:
        train = [self.data / f"{domain}.train.jsonl" for _, domains in STAGES.values() for domain in domains]
        return [self.data / "model", *train, *self._benches()]


class Loaded:
    """A model and its tokenizer, loaded when first asked for: not at all where every measurement is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _pair(self) -> tuple[PreTrainedModel, Any]:
        model, tokenizer = load(self.folder)
        return model, tokenizer

    @property
    def model(self) -> PreTrainedModel:
        return self._pair[0]

    @property
    def tokenizer(self) -> Any:
        return self._pair[1]


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in a model folder that decide what the model says.

    An adapter's manifest fingerprints its base, so the adapter's own files are enough.
    """
    names = ("*.safetensors", "*.jinja", "config.json", "molora.json", "tokenizer*.json")
    return {path.name: file_sha256(path) for pattern in names for path in sorted(folder.glob(pattern))}


def _spread(rows: list[Any], count: int) -> list[Any]:
    """``count`` rows at even distances, so that every part of a sorted file is among them; all if there are fewer."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows


def _training_seconds(output: Path) -> float:
    total, before = 0.0, 0
    for entry in metrics.read(output / metrics.FILE):
        if "seconds_per_step" in entry:
            total += entry["seconds_per_step"] * (entry["step"] - before)
            before = entry["step"]
    return total


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None if there is none that can be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` default to the process's own. Raises :class:`UserError` for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m molora.quickstart",
        description="Train both stages on a small real model, measure before, between and after, and report.",
    )
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    Quickstart(options.data, options.out).run()


if __name__ == "__main__":
    cli.run(main)
