"""Pictures: panels, each drawn on its own as SVG for a page and together as PNG for everything else.

Shape letters: R routers, E experts, L layers.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molora.colours import colour
from molora.errors import UserError
from molora.files import replacing
from molora.report.statistics import shares
from molora.routing import by_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
"""Stands for the page's own text colour in an SVG, so that pictures follow a light or dark page."""
DASHES = ("-", "--", ":", "-.")
"""Lines differ in colour and in dashes: for print, and for eyes that see few colours."""


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Line:
    """A series for :func:`lines`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marker: str = ""
    faint: bool = False


def lines(title: str, series: Sequence[Line], *, x: str, y: str, settings: Mapping[str, Any] | None = None) -> Panel:
    """Lines over a common x. ``settings``: ``level`` (y of a dotted line), ``band`` (x, low, high, label), ``marks``
    (x of vertical lines with labels), ``log`` (y axis), ``floor`` (lowest y shown)."""
    more = dict(settings or {})

    def draw(ax: Axes) -> None:
        if "band" in more:
            at, low, high, label = more["band"]
            ax.fill_between(at, low, high, color="#999999", alpha=0.35, linewidth=0, label=label)
        for i, line in enumerate(series):
            ax.plot(
                line.x,
                line.y,
                color="#999999" if line.faint else colour(i),
                linestyle=DASHES[i // 8 % 4] if line.faint else DASHES[i % 4],
                linewidth=1.0 if line.faint else 1.7,
                marker=line.marker or None,
                markersize=4,
                label=line.label,
            )
        if "level" in more:
            ax.axhline(more["level"], color=INK, linewidth=0.8, linestyle=":")
        for at, label in more.get("marks", ()):
            ax.axvline(at, color=INK, linewidth=0.8, linestyle=":")
            ax.annotate(label, (at, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), fontsize=7, color=INK,
                        textcoords="offset points")  # fmt: skip
        if more.get("log"):
            ax.set_yscale("log")
        if "floor" in more:
            ax.set_ylim(bottom=more["floor"])
        named = len(series) + ("band" in more)
        _leave_room(ax, max(0.05 + 0.08 * min(named, 4) if named > 1 else 0.0, 0.1 if more.get("marks") else 0.0))
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        _whole_numbers(ax)
        if named > 1:
            ax.legend(fontsize=8, frameon=False, loc="best", labelcolor=INK)

    return Panel(title, draw)


def stack(title: str, layers: Sequence[int], share: Tensor) -> Panel:
    """Stacked bars of shares (L, E), with dotted lines where each expert's would end if all were equal."""

    def draw(ax: Axes) -> None:
        _stack(ax, layers, share)
        ax.set_xlabel("layer")
        _whole_numbers(ax)

    return Panel(title, draw)


def heat(title: str, table: Tensor, *, x: Sequence[float], y: Sequence[int], labels: tuple[str, str, str],
         limits: tuple[float, float], diverging: bool = False) -> Panel:  # fmt: skip
    """A table (len(y), len(x)) in colours; ``labels`` of x, y and the colours."""

    def draw(ax: Axes) -> None:
        image = ax.pcolormesh(
            _edges(x), _edges(y), table.numpy(), cmap="PuOr" if diverging else "cividis", vmin=limits[0], vmax=limits[1]
        )
        bar = ax.figure.colorbar(image, ax=ax, label=labels[2])
        bar.outline.set_edgecolor(INK)
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
        _whole_numbers(ax)

    return Panel(title, draw)


def svg(panel: Panel) -> str:
    """The panel as an ``<svg>`` element that is as wide as its place and has the colour of the text around it."""
    matplotlib = _matplotlib()
    settings = {"svg.fonttype": "none", "svg.hashsalt": panel.title, "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(_inked(INK) | settings):
        figure = _figure((4.2, 2.5))
        ax = figure.subplots()
        panel.draw(ax)
        ax.spines[["top", "right"]].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{_attribute(panel.title)}">{rest}'


def png(panels: Sequence[Panel], path: Path, *, columns: int, title: str) -> None:
    """All panels in one PNG file, row by row. Raises :class:`UserError` if it cannot be written."""
    matplotlib = _matplotlib()
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_inked("#000000") | {"font.size": 9}):
        figure = _figure((4.6 * columns, 0.5 + 2.5 * rows))
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax, panel in zip(axes.flat, panels, strict=False):
            panel.draw(ax)
            ax.set_title(panel.title, fontsize=10)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if axes[0, 0].get_legend() is None and len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 8), frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        # INK is black to the eye already.
        with replacing(path) as new:
            figure.savefig(new, format="png", dpi=110)


def share_panels(names: Sequence[str], share: Mapping[str, Tensor]) -> list[Panel]:
    """For each kind of projection a panel for each domain's shares (R, E) and, for two domains, their difference."""
    panels = []
    both = list(share.values())
    reach = max(100 * float((both[1] - both[0]).abs().max()), 1.0) if len(both) == 2 else 0.0
    for kind, rows in by_kind(names).items():
        layers, where = list(rows), list(rows.values())
        panels += [stack(f"{domain} · {kind}", layers, table[where]) for domain, table in share.items()]
        if len(both) == 2:
            earlier, later = share
            change = 100 * (both[1] - both[0])[where]
            labels = ("layer", "expert", "percentage points")
            panels.append(
                heat(f"{later} minus {earlier} · {kind}", change.T, x=layers, y=range(change.shape[1]), labels=labels,
                     limits=(-reach, reach), diverging=True)
            )  # fmt: skip
    return panels


def draw_routing(names: Sequence[str], counts: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Draw each expert's share of the tokens, layer by layer, one domain beside the other, to a PNG file.

    Args:
        names: R router names, such as ``model.layers.0.mlp.gate_proj``.
        counts: for each domain (R, E): how many tokens chose each expert.
        path: replaced only when the picture is whole.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    share = {domain: shares(table) for domain, table in counts.items()}
    png(share_panels(names, share), path, columns=len(share) + (len(share) == 2), title=title)


def _stack(ax: Axes, layers: Sequence[int], share: Tensor) -> None:
    experts = share.shape[1]
    below = torch.zeros(len(layers), dtype=share.dtype)
    for expert in range(experts):
        ax.bar(
            layers,
            share[:, expert].tolist(),
            bottom=below.tolist(),
            width=0.92,
            color=colour(expert),
            linewidth=0,
            label=f"expert {expert}",
        )
        below += share[:, expert]
        if expert:
            ax.axhline(expert / experts, color=INK, linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _edges(centres: Sequence[float]) -> list[float]:
    """Borders of cells around rising centres."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    first = centres[0] - (middles[0] - centres[0] if middles else 0.5)
    last = centres[-1] + (centres[-1] - middles[-1] if middles else 0.5)
    return [first, *middles, last]


def _leave_room(ax: Axes, share: float) -> None:
    """Keep this share of the height, at the top, free of lines, for a legend and the labels of marks."""
    scale = ax.yaxis.get_transform()
    bottom, top = scale.transform(ax.get_ylim())
    ax.set_ylim(top=scale.inverted().transform([top + (top - bottom) * share / (1 - share)])[0])


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _inked(ink: str) -> dict[str, Any]:
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(names, ink)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs the package matplotlib: pip install 'molora[report]'") from None
    return matplotlib


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
