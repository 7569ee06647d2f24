"""Draw the plots and fill the tables of the pages, from the JSON files in bench/results alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import plots, tables
from bench.arguments import Mistake

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "kernels.md", ROOT / "docs" / "recipe.md")


def load(folder: Path = RESULTS) -> tables.Results:
    """Name -> result. What has no shape (the compile matrix, the metrics' cost) is no result that a page shows.

    Raises:
        Mistake: a file that is cut off, or is no JSON.
    """
    found = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in found.items() if _has_shape(result)}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Mistake(f"{path}: is no JSON ({error}); measure it again, or take it away") from error


def _has_shape(result: Any) -> bool:
    """By itself, or in each run of a sweep."""
    if not isinstance(result, dict):
        return False
    return "shape" in result or ("over" in result and all("shape" in run for run in result["runs"]))


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
