"""The picture of the routing."""

import struct
from pathlib import Path

import pytest
import torch

from molora import report
from molora.errors import UserError

NAMES = [f"model.layers.{layer}.mlp.{kind}" for layer in (0, 1, 2) for kind in ("gate_proj", "down_proj")]


def test_shares() -> None:
    counts = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(report.shares(counts), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))


def test_routers_by_kind_and_layer() -> None:
    shuffled = [NAMES[i] for i in (4, 0, 2, 5, 3, 1)]
    assert report._by_kind(shuffled) == {"gate_proj": {0: 1, 1: 2, 2: 0}, "down_proj": {0: 5, 1: 4, 2: 3}}
    assert report._by_kind(["model.layers.3.mlp", "router"]) == {"mlp": {3: 0}, "router": {0: 1}}


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
    report._stack(ax, [4, 6], torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    bars = [[(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in c] for c in ax.containers]
    assert bars == [[(4, 0, 0.25), (6, 0, 0.5)], [(4, 0.25, 0.75), (6, 0.5, 0.5)]]


def test_draw_routing_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        report.draw_routing(NAMES, {"a": torch.ones(6, 2)}, tmp_path / "file" / "routing.png", "title")
