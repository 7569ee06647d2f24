from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from molora import config, provenance


def test_what_is_collected_says_what_ran_on_what(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    found = provenance.collect(config.load(None, [f"data.path=[{path}]", "seed=3"]))
    assert found["seed"] == 3
    assert found["data"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert found["packages"]["torch"].startswith("2.")
    assert found["cpus"] >= 1
    assert json.loads(json.dumps(found)) == found
    assert provenance.collect(config.load())["data"] == {}


def test_what_git_does_not_say_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = provenance.collect(config.load())
    assert (found["commit"], found["uncommitted_changes"]) == (None, None)
