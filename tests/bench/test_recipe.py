"""``bench recipe``, with a small model: both presets, their row lengths and the phase change are the real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bench import recipe
from molora import chat

ROOT = Path(__file__).parent.parent.parent


def test_every_row_is_as_long_as_the_stage_takes_it(tmp_path: Path) -> None:
    recipe.make_base("tiny", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    recipe.make_rows(tmp_path / "rows.jsonl", 3, 50)
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        found = chat.encode_row(tokenizer, json.loads(line), 100)
        assert len(found.input_ids) == 50


@pytest.mark.slow
def test_both_stages_are_trained_and_told(tmp_path: Path) -> None:
    result = tmp_path / "recipe.json"
    command = [
        sys.executable, "-m", "bench", "recipe", "--model", "tiny", "--steps", "2", "--threads", "1",
        "--folder", str(tmp_path), "--set", "kernels.backend=torch", "--set", "training.grad_accum_steps=1",
        "--json", str(result),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    one, two = json.loads(result.read_text())["rows"]
    assert (one["tokens_per_step"], two["tokens_per_step"]) == (10 * 512, 8 * 1024)
    assert all(row["seconds_per_step"] > 0 and row["resident_gb"] > 0.1 for row in (one, two))
    assert "phase from step 1 | trains: router" in done.stdout and "stage 2: " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
