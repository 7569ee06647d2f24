"""Every Python block of the how-to pages runs: those under one heading in order, beside a tiny random model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import make_rows, write_jsonl

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ["any-trainer.md"]


def programs() -> list:
    """(page and heading, the blocks under that heading as one program)"""
    found = []
    for page in PAGES:
        for section in re.split(r"^## ", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
            blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
            if blocks:
                found.append(pytest.param("\n".join(blocks), id=f"{page}: {section.splitlines()[0]}"))
    return found


@pytest.mark.parametrize("program", programs())
@pytest.mark.filterwarnings("ignore")
def test_examples_run(program, tiny_model_dir, tmp_path, monkeypatch):
    for package in ("accelerate", "datasets", "peft", "trl"):
        if f"import {package}" in program or f"from {package}" in program:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "base").symlink_to(tiny_model_dir)
    write_jsonl(tmp_path / "rows.jsonl", make_rows(16))
    exec(compile(program, "example", "exec"), {"__name__": "__main__"})
