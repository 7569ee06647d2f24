"""Draw the plots and fill the tables of README.md and docs/kernels.md, from the JSON files in bench/results alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import plots, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "kernels.md")


def load(folder: Path = RESULTS) -> tables.Results:
    """Name -> result."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")


def run(options: argparse.Namespace) -> int:
    results = load()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = tables.fill(text, results)
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    if not options.no_plots:
        for path in plots.draw(results, ROOT / "docs" / "bench"):
            print(f"wrote {path.relative_to(ROOT)}")
    return 0
