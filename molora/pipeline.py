"""Trainings and measurements that depend on one another, as the parts of one output folder: what is done already is
not done again, and what was interrupted goes on.

    <out>/<name>/               a run, as molora.train writes it
    <out>/<name>.inputs.json    what it was trained from
    <out>/measured/             measurements, row by row
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from molora import checkpoint, metrics, train
from molora.errors import UserError
from molora.evaluate import Opened, evaluate_kept, fingerprint
from molora.files import file_sha256, write_text
from molora.scores import BenchResult


@dataclass(frozen=True)
class Bench:
    """A file of held-out rows and how it is measured, see :func:`molora.evaluate.evaluate`."""

    path: Path
    settings: Mapping[str, Any]


@dataclass
class Pipeline:
    """One output folder, brought up to date part by part."""

    out: Path
    console: Console = field(default_factory=Console)
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part took when it was done, in this run or an earlier one."""

    def trained(
        self, name: str, preset: Path, model: str | Path, data: Sequence[Path], overrides: Sequence[str] = ()
    ) -> Path:
        """Train the run ``name`` from ``model``, or finish it, or find it finished; returns its ``final`` folder.

        Raises :class:`UserError` if it was begun from another model, preset or data.
        """
        output, note = self.out / name, self.out / f"{name}.inputs.json"
        inputs = {
            "preset": file_sha256(preset),
            "overrides": list(overrides),
            "data": [file_sha256(path) for path in data],
            "model": fingerprint(model),
        }
        if output.is_dir() and _read_json(note) != inputs:
            raise UserError(
                f"{output}: was trained from another model, preset or data than now; remove {output} to train it "
                "again, or give another --out"
            )
        if checkpoint.finished(output):
            self.console.print(f"{name}: trained already", highlight=False)
        else:
            write_text(note, json.dumps(inputs, indent=1) + "\n")
            with self._part(f"{name}: train"):
                sets = [f"model_name={json.dumps(str(model))}", f"data.path={json.dumps([str(p) for p in data])}"]
                train.main(
                    [
                        *("--preset", str(preset), "--output-dir", str(output), "--resume"),
                        *(part for value in (*sets, *overrides) for part in ("--set", value)),
                    ]
                )
        # From the log and not from a clock, because an interrupted run was trained in several goes.
        self.seconds[f"{name}: train"] = training_seconds(output)
        return output / checkpoint.FINAL

    def evaluated(self, name: str, model: str | Path, benches: Mapping[str, Bench]) -> dict[str, BenchResult]:
        """``model`` on every bench."""
        opened = Opened(model)
        results = {}
        for bench, how in benches.items():
            title = f"{name}: evaluate on {bench}"
            results[bench] = evaluate_kept(
                opened, how.path, self.out / "measured", title=f"{name}, {bench}", **how.settings
            )
            self.seconds[title] = results[bench].seconds
            self.console.print(f"{title}: {clock(self.seconds[title])}", highlight=False)
        return results

    def measured(self, title: str, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The value that a file holds if it was measured under the same ``key``, else a new one, kept in that file."""
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
        started = perf_counter()
        yield
        self.seconds[title] = perf_counter() - started
        self.console.print(f"{title}: {clock(self.seconds[title])}", highlight=False)


def training_seconds(output: Path) -> float:
    """What all steps of a run took, by its log."""
    return sum(entry["seconds_per_step"] * steps for entry, steps in _intervals(output))


def training_tokens(output: Path) -> int:
    """Tokens that a run read, by its log; padding does not count."""
    return round(
        sum(entry["tokens_per_second"] * entry["seconds_per_step"] * steps for entry, steps in _intervals(output))
    )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def _intervals(output: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The entries of a log about steps, each with how many steps it is about."""
    before = 0
    for entry in metrics.read(output / metrics.FILE):
        if "seconds_per_step" in entry:
            yield entry, entry["step"] - before
            before = entry["step"]


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None if there is none that can be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
