"""The plots of the documentation, from results alone. Colours are Okabe and Ito's, told apart by colour-blind readers;
every line has its own marker too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]

STYLES = {
    "molora": ("#000000", "o"),
    "molora dense": ("#0072B2", "s"),
    "molora grouped": ("#D55E00", "D"),
    "dense eager": ("#56B4E9", "^"),
    "naive loop": ("#E69F00", "v"),
    "loop with index_select": ("#F0C808", "<"),
    "PEFT LoRA r=128": ("#009E73", ">"),
    "eulerforge": ("#CC79A7", "P"),
}
FLOORS = {
    "roofline_dense": ("roofline, all experts", "-", "#d2d2d2", 4.5),
    "roofline_grouped": ("roofline, chosen experts", ":", "#d2d2d2", 4.5),
    "flops_dense": ("arithmetic of all experts", "--", "#777777", 1.2),
    "flops_sparse": ("arithmetic of the chosen experts", ":", "#777777", 1.4),
}
"""Where all is bound by arithmetic roofline and arithmetic are one; hence the wide pale lines below the narrow ones."""
TICKS = (1.0, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
LABELS = {"tokens": "tokens", "experts": "experts E", "rank": "rank r", "top_k": "experts chosen k", "layers": "layers"}


def draw(results: Mapping[str, Result], folder: Path) -> list[Path]:
    """Draw what there are results for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for device in ("cpu", "cuda"):
        sweeps = [result for name, result in results.items() if name.startswith(f"sweep-{device}-")]
        for name, chosen in (
            ("tokens", [s for s in sweeps if s["over"] == "tokens"]),
            ("sweeps", [s for s in sweeps if s["over"] != "tokens"]),
        ):
            if chosen:
                drawn.append(_figure(chosen, folder / f"{device}-{name}.png"))
    return drawn


def _figure(sweeps: list[Result], path: Path) -> Path:
    from matplotlib.figure import Figure

    sweeps = sorted(sweeps, key=lambda s: (_dtype(s) != "fp32", list(LABELS).index(s["over"])))
    columns = min(2, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure = Figure(figsize=(5.2 * columns + 0.6, 3.9 * lines + 1.3), dpi=130, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax, sweep in zip(axes.flat, sweeps, strict=False):
        _panel(ax, sweep)
    for ax in list(axes.flat)[len(sweeps) :]:
        ax.set_axis_off()
    found: dict[str, Any] = {}
    for ax in axes.flat:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=min(columns, 2) + 1, frameon=False, fontsize=9
    )
    figure.savefig(path)
    return path


def _panel(ax: Axes, sweep: Result) -> None:
    over, runs = sweep["over"], sorted(sweep["runs"], key=lambda run: run["shape"][sweep["over"]])
    values = [run["shape"][over] for run in runs]
    for variant, (colour, marker) in STYLES.items():
        points = [
            (v, row) for v, run in zip(values, runs, strict=True) for row in run["rows"] if row["variant"] == variant
        ]
        if not points:
            continue
        ours = variant.startswith("molora")
        ax.plot(
            [v for v, _ in points], [row["ratio"] for _, row in points], color=colour, marker=marker,
            markersize=9 if variant == "molora" else 5, markerfacecolor="none" if variant == "molora" else colour,
            linewidth=0 if variant == "molora" else 1.8 if ours else 1.1, zorder=3 if ours else 2,
            label="molora: what the rule takes" if variant == "molora" else variant,
        )  # fmt: skip
    for key, (label, dashes, grey, width) in FLOORS.items():
        floor = [run["floors"][key] for run in runs if key in run.get("floors", ())]
        if floor:
            ax.plot(values, floor, color=grey, linestyle=dashes, linewidth=width, label=label, zorder=1)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(values, [f"{v:,}" for v in values])
    ax.minorticks_off()
    low, high = _range(row["ratio"] for run in runs for row in run["rows"])
    ax.set_ylim(low, high)
    ticks = _apart([tick for tick in TICKS if low <= tick <= high], least=math.log(high / low) / 14)
    ax.set_yticks(ticks, [f"{100 * (tick - 1):+.0f} %" if tick != 1 else "frozen base" for tick in ticks])
    ax.minorticks_off()
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel(LABELS[over])
    ax.set_title(_title(sweep), fontsize=10, loc="left")


def _range(ratios: Iterable[float]) -> tuple[float, float]:
    every = list(ratios)
    return min(0.97, 0.97 * min(every)), 1.08 * max(1.2, *every)


def _apart(ticks: list[float], least: float) -> list[float]:
    """Those that lie far enough from the last one kept, on a logarithmic axis, for their labels not to touch."""
    kept = ticks[:1]
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) >= least:
            kept.append(tick)
    return kept


def _dtype(sweep: Result) -> str:
    return sweep["runs"][0]["shape"]["dtype"]


def _title(sweep: Result) -> str:
    """What is swept, and on what."""
    shape, over, of = sweep["runs"][0]["shape"], sweep["over"], sweep["provenance"]
    machine = of["gpu"] if shape["device"] == "cuda" else of["cpu"].split(",")[0].replace("(R)", "")
    if over == "layers":
        what = f"training step, hidden {shape['config']['hidden_size']}, {shape['dtype']}, T = {shape['tokens']:,}"
    else:
        letters = {"tokens": "T", "experts": "E", "top_k": "k", "rank": "r"}
        fixed = ", ".join(f"{letter} = {shape[key]:,}" for key, letter in letters.items() if key != over)
        what = f"MLP, hidden {shape['hidden']:,}, {shape['dtype']}, {fixed}"
    return f"{what}\n{machine}"
