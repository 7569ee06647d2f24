"""Where a number came from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import provenance


def test_changed_code_is_said_and_changed_results_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep writes its result while it measures."""
    code, result = tmp_path / "bench" / "code.py", tmp_path / "bench" / "results" / "sweep.json"
    result.parent.mkdir(parents=True)
    for path in (code, result):
        path.write_text("before\n", encoding="utf-8")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(code))

    assert provenance.provenance()["uncommitted_changes"] is False
    result.write_text("after\n", encoding="utf-8")
    assert provenance.provenance()["uncommitted_changes"] is False
    code.write_text("after\n", encoding="utf-8")
    assert provenance.provenance()["uncommitted_changes"] is True
