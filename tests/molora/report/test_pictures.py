"""The picture of the routing."""

import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from molora import report
from molora.errors import UserError
from molora.report import pictures

NAMES = [f"model.layers.{layer}.mlp.{kind}" for layer in (0, 1, 2) for kind in ("gate_proj", "down_proj")]


def test_an_svg_follows_the_page_and_says_what_it_is() -> None:
    panel = pictures.lines('loss "a" <b>', [pictures.Line("x", [0, 1], [1, 2])], x="step", y="nats")
    text = pictures.svg(panel)
    element = ElementTree.fromstring(text)
    assert element.get("aria-label") == panel.title and element.get("width") is None
    assert "currentColor" in text and pictures.INK not in text
    assert pictures.svg(panel) == text


def test_cells_are_around_their_centres() -> None:
    assert pictures._edges([1, 2, 4]) == [0.5, 1.5, 3.0, 5.0]
    assert pictures._edges([3]) == [2.5, 3.5]


@pytest.mark.parametrize(
    "settings", [{}, {"floor": 0.0}, {"log": True}, {"marks": [(0, "router")]}, {"marks": [(0, "a")], "floor": 0.0}]
)
@pytest.mark.parametrize("count", [1, 4])
def test_words_lie_over_no_line(settings: dict, count: int) -> None:
    """Lines that fill the panel from its lowest value to its highest, all along."""
    from matplotlib.figure import Figure

    zigzag = [0.1 + 5 * (step % 2) for step in range(30)]
    series = [pictures.Line(f"run {i}", list(range(30)), zigzag) for i in range(count)]
    figure = Figure(figsize=(4.2, 2.5), layout="constrained")
    ax = figure.subplots()
    pictures.lines("loss", series, x="step", y="nats", settings=settings).draw(ax)
    figure.draw_without_rendering()
    legend = ax.get_legend()
    boxes = [text.get_window_extent() for text in ax.texts] + ([legend.get_window_extent()] if legend else [])
    assert len(boxes) == ("marks" in settings) + (count > 1)
    for line in ax.lines[:count]:
        path = line.get_path().transformed(line.get_transform())
        assert not [box for box in boxes if path.intersects_bbox(box, filled=False)]


@pytest.mark.parametrize("domains", [("general",), ("general", "maths"), ("a", "b", "c")])
def test_draw_routing(domains: tuple[str, ...], tmp_path: Path) -> None:
    counts = {domain: torch.rand(len(NAMES), 4) for domain in domains}
    path = tmp_path / "deep" / "routing.png"
    report.draw_routing(NAMES, counts, path, "title")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width > 500 and height > 500
    assert [entry.name for entry in path.parent.iterdir()] == ["routing.png"]


def test_bars_of_a_layer_reach_from_nothing_to_all() -> None:
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    pictures._stack(ax, [4, 6], torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    bars = [[(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in c] for c in ax.containers]
    assert bars == [[(4, 0, 0.25), (6, 0, 0.5)], [(4, 0.25, 0.75), (6, 0.5, 0.5)]]


def test_draw_routing_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        report.draw_routing(NAMES, {"a": torch.ones(6, 2)}, tmp_path / "file" / "routing.png", "title")
