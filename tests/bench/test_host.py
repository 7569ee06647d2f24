"""``bench host``: in a process of its own, since from its start on nothing is launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_a_layer_with_experts_has_few_more_launches_than_a_frozen_one(tmp_path: Path) -> None:
    result = tmp_path / "host.json"
    command = [sys.executable, "-m", "bench", "host", "--rounds", "2", "--warmup", "2", "--json", str(result)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent.parent, env=environment)
    rows = {row["variant"]: row for row in json.loads(result.read_text())["rows"]}
    launches = {name: row["kernels"] + row["operators"] for name, row in rows.items()}
    assert rows["frozen base"]["kernels"] == 0 < rows["molora"]["kernels"]
    # Six for each of seven projections, three routers, all of their gradients, the products of the adapters included.
    assert 14 < launches["molora"] - launches["frozen base"] <= 7 * 6 + 3 * 4
    assert all(row["host_ms"] > 0 for row in rows.values())
