"""What the routers did, as a picture.

Pure functions from numbers to pictures; what measures and trains is elsewhere.

Shape letters: R routers, E experts, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from molora.errors import UserError
from molora.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with every common kind of colour blindness, and by lightness in print.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def shares(counts: Tensor) -> Tensor:
    """Counts (R, E) of tokens per expert as shares that sum to 1 for each router; equal shares where it saw none."""
    total = counts.sum(dim=1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp(min=1), 1 / counts.shape[1])


def draw_routing(names: Sequence[str], counts: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Draw each expert's share of the tokens, layer by layer, one domain beside the other, to a PNG file.

    A row of panels for each kind of projection with a router; a column for each domain and, for two domains, one
    for their difference.

    Args:
        names: R router names, such as ``model.layers.0.mlp.gate_proj``.
        counts: for each domain (R, E): how many tokens chose each expert.
        path: replaced only when the picture is whole.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("drawing needs the package matplotlib: pip install matplotlib") from None
    kinds = _by_kind(names)
    share = {domain: shares(table) for domain, table in counts.items()}
    difference = list(share.values()) if len(share) == 2 else []
    columns = len(share) + bool(difference)
    figure = Figure(figsize=(4.6 * columns, 1.3 + 2.1 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), columns, squeeze=False)
    reach = max((100 * float((difference[1] - difference[0]).abs().max()), 1.0)) if difference else 0.0
    image = None
    for i, (kind, rows) in enumerate(kinds.items()):
        layers = list(rows)
        for ax, (domain, table) in zip(axes[i], share.items(), strict=False):
            _stack(ax, layers, table[list(rows.values())])
            ax.set_title(f"{domain} · {kind}", fontsize=10)
        axes[i, 0].set_ylabel("share of tokens")
        if difference:
            ax = axes[i, -1]
            change = 100 * (difference[1] - difference[0])[list(rows.values())]
            edges = (layers[0] - 0.5, layers[-1] + 0.5, change.shape[1] - 0.5, -0.5)
            image = ax.imshow(
                change.T.numpy(),
                cmap="PuOr",
                vmin=-reach,
                vmax=reach,
                aspect="auto",
                extent=edges,
                interpolation="none",
            )
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_ylabel("expert")
            earlier, later = share
            ax.set_title(f"{later} minus {earlier} · {kind}", fontsize=10)
    for ax in axes.flat:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    if image is not None:
        figure.colorbar(image, ax=axes[:, -1].tolist(), label="percentage points", shrink=0.8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 8), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=120)


def _by_kind(names: Sequence[str]) -> dict[str, dict[int, int]]:
    """kind of projection -> layer -> row in the counts; a name without a layer number is a kind of its own."""
    kinds: dict[str, dict[int, int]] = {}
    for row, name in enumerate(names):
        match = re.search(r"\.(\d+)\.(.+)$", name)
        layer, kind = (int(match[1]), match[2].removeprefix("mlp.")) if match else (0, name)
        kinds.setdefault(kind, {})[layer] = row
    return {kind: dict(sorted(rows.items())) for kind, rows in kinds.items()}


def _stack(ax: Axes, layers: Sequence[int], share: Tensor) -> None:
    """Stacked bars of shares (L, E), with a line where each expert's share would end if all were equal."""
    experts = share.shape[1]
    below = torch.zeros(len(layers), dtype=share.dtype)
    for expert in range(experts):
        ax.bar(
            layers,
            share[:, expert].tolist(),
            bottom=below.tolist(),
            width=1.0,
            color=_COLOURS[expert % len(_COLOURS)],
            edgecolor="white",
            linewidth=0.5,
            label=f"expert {expert}",
        )
        below += share[:, expert]
        if expert:
            ax.axhline(expert / experts, color="black", linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
