"""``python -m molora.report run DIR [DIR …]``: how runs went, from their ``metrics.jsonl``.

Writes ``run.html``, one page for all of them, and ``run.png`` to ``--out``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molora import checkpoint, config, metrics
from molora.errors import UserError
from molora.folders import short_names
from molora.report import page, pictures, statistics
from molora.report.page import Section
from molora.report.pictures import Line, Panel
from molora.routing import by_kind


@dataclass(frozen=True)
class Run:
    """One run's log."""

    lines: list[dict[str, Any]]
    phases: list[tuple[int, str]]
    """(first step, what trains)"""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of every line that has ``key``."""
        found = [(line["step"], line[key]) for line in self.lines if key in line]
        return [step for step, _ in found], [value for _, value in found]


def add_command(commands: Any) -> None:
    parser = commands.add_parser("run", help="loss, lr, phases, routing and speed of runs", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="DIR", help="output folder of molora.train")
    parser.add_argument("--out", type=Path, default=Path("outputs/report"), metavar="DIR", help="default: %(default)s")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> None:
    """Read, draw, write. Raises :class:`UserError` for bad input."""
    runs = {name: read(Path(folder)) for name, folder in short_names(options.runs).items()}
    made, panels = _page(runs)
    pictures.png(panels, options.out / "run.png", columns=2, title=made.title)
    page.write(made, options.out / "run.html")
    print("\n".join(made.lead))
    print(f"written: {options.out / 'run.html'} and run.png")


def read(folder: Path) -> Run:
    """The log and the phases of the run in ``folder``. Raises :class:`UserError` where there is none."""
    path = folder / metrics.FILE
    if not path.is_file():
        raise UserError(f"{path}: missing; give the --output-dir of a run of molora.train")
    try:
        lines = [line for line in metrics.read(path) if isinstance(line, dict) and isinstance(line.get("step"), int)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not any("loss" in line for line in lines):
        raise UserError(f"{path}: no line with a loss; the run stopped before its first log step")
    settings = folder / checkpoint.CONFIG
    phases = config.load(settings).training.phases if settings.is_file() else []
    return Run(lines, [(phase.step, ", ".join(phase.trainable)) for phase in phases])


def _page(runs: Mapping[str, Run]) -> tuple[page.Page, list[Panel]]:
    lead = [_words(name, run) for name, run in runs.items()]
    only = next(iter(runs.values())) if len(runs) == 1 else None
    marks = [(step, f"+ {what}" if step else what) for step, what in only.phases] if only else []

    def panel(title: str, y: str, keys: Mapping[str, str], **settings: Any) -> Panel | None:
        series = []
        for name, run in runs.items():
            for key, label in keys.items():
                steps, values = run.series(key)
                full = f"{name} {label}".strip() if len(runs) > 1 else label or y
                if steps:
                    series.append(Line(full, steps, values, marker="o" if key == "val_loss" else ""))
        return pictures.lines(title, series, x="step", y=y, settings=settings) if series else None

    training = [
        panel("loss", "nats per label token", {"loss": "training", "val_loss": "held out"}, marks=marks),
        panel("learning rate", "lr", {"lr": ""}, marks=marks, floor=0.0),
        panel("gradient norm", "2-norm before clipping", {"grad_norm": ""}, log=True),
        panel("speed", "tokens per second", {"tokens_per_second": ""}, floor=0.0),
    ]
    balance = [
        panel("load balance", "load balance", {"load_balance": ""}, level=1.0),
        panel("z-loss", "z-loss", {"z_loss": ""}),
    ]
    routed = [_information(runs), *(heat for name, run in runs.items() for heat in _busiest(name, run, len(runs) > 1))]
    sections = [
        Section(
            "training",
            "Means over the steps between two log lines, skipped steps left out; the loss is cross-entropy without the "
            "routers' losses."
            + (" Dotted lines: the first step of a phase and what trains from there on." if only else ""),
            found := [p for p in training if p],
        ),
        Section(
            "routers",
            "Load balance: E Σ f P, mean over routers, 1 is balance. z-loss: mean squared logsumexp of the logits. "
            "Both as logged, before their coefficients.",
            more := [p for p in balance if p],
        ),
    ]
    if last := [p for p in routed if p]:
        sections.append(Section(
            "routing, layer by layer",
            "The busiest expert's share of a router's choices at the last step before each log line; and the plug-in "
            "mutual information in bits between a token's domain and its expert, domains weighted equally, mean over "
            "routers, over the steps since the log line before (logging.metrics_level: advanced). It is above 0 by "
            "chance too: python -m molora.report routing has the baseline.",
            last,
        ))  # fmt: skip
    warnings = [
        [name, str(line["step"]), line["warning"]] for name, run in runs.items() for line in run.lines
        if "warning" in line
    ]  # fmt: skip
    if warnings:
        table = page.Table(["run", "step", "warning"], warnings, text_columns=3)
        sections.append(Section("warnings", "As the run wrote them.", table=table))
    return page.Page(f"Runs: {', '.join(runs)}", lead, sections), [*found, *more, *last]


def _words(name: str, run: Run) -> str:
    steps, losses = run.series("loss")
    _, held_out = run.series("val_loss")
    _, skipped = run.series("skipped")
    _, speed = run.series("tokens_per_second")
    words = f"{name}: {int(steps[-1])} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    words += f", held out {held_out[0]:.3f} to {held_out[-1]:.3f}" if held_out else ""
    words += f"; {sum(speed) / len(speed):,.0f} tokens per second" if speed else ""
    return words + (f"; {int(skipped[-1])} steps skipped" if skipped and skipped[-1] else "") + "."


def _information(runs: Mapping[str, Run]) -> Panel | None:
    series = []
    for name, run in runs.items():
        steps, values = run.series("domains")
        found = [(step, of) for step, of in zip(steps, values, strict=True) if len(of) > 1]  # type: ignore[arg-type]
        bits = []
        for _, domains in found:
            shares = torch.tensor([list(entry["load"].values()) for entry in domains.values()])  # type: ignore[attr-defined]
            bits.append(float(statistics.mutual_information(shares).mean()))
        if bits:
            series.append(Line(name, [step for step, _ in found], bits))
    if not series:
        return None
    return pictures.lines("domain and expert", series, x="step", y="bits", settings={"floor": 0.0})


def _busiest(name: str, run: Run, several: bool) -> list[Panel]:
    """For each kind of projection the busiest expert's share, layer by step."""
    steps, loads = run.series("load")
    if not steps or not loads[0]:
        return []
    names = list(loads[0])  # type: ignore[call-overload]
    share = torch.tensor([[max(row) for row in load.values()] for load in loads])  # type: ignore[attr-defined]
    limits = (float(share.min()), float(share.max()))
    labels = ("step", "layer", "busiest expert's share")
    prefix = f"{name} · " if several else ""
    return [
        pictures.heat(f"{prefix}{kind}", share[:, list(rows.values())].T, x=steps, y=list(rows), labels=labels,
                      limits=limits)
        for kind, rows in by_kind(names).items()
    ]  # fmt: skip
