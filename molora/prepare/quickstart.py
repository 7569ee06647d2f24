"""``quickstart``: a real small model and real data for both stages, in one folder, within a minute.

``<out>/model/`` is SmolLM2-135M-Instruct; ``general.*.jsonl`` and ``maths.*.jsonl`` are the data of stages 1 and 2 with
their benches; ``manifest.json`` says what made them and holds a hash of every file. A second run compares the manifest
with what it would do and with the files, and builds only what differs.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from molora import files
from molora.errors import UserError
from molora.prepare import general, maths, smollm2
from molora.prepare.rows import Row, write_jsonl

GENERATOR = 5
"""Raised with every change of this code that changes what it writes, so that folders made before are made again."""

MANIFEST = "manifest.json"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="SmolLM2-135M-Instruct, English and Korean chat, worked arithmetic",
        description="Write the model and the data of the quickstart. A second run reuses what is there.",
    )
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of problems and splits (default: %(default)s)")
    parser.set_defaults(prepare=lambda options: prepare(options.out, options.seed))


def prepare(out: Path, seed: int = 42, console: Console | None = None) -> dict[str, Any]:
    """Bring the folder ``out`` up to date and return its manifest."""
    if seed < 0:
        raise UserError(f"--seed {seed}: must not be negative")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder")
    console = console or Console()
    manifest = _read_manifest(out)
    for name, recipe, build in (
        ("model", _model_recipe(), lambda: _build_model(out)),
        ("general", _data_recipe(general.REQUIREMENT, seed), lambda: _build_data(out, "general", general.build, seed)),
        ("maths", _maths_recipe(seed), lambda: _build_data(out, "maths", maths.build, seed)),
    ):
        reason = _why_build(out, name, recipe, manifest.get(name))
        if reason is None:
            console.print(f"{name}: up to date", highlight=False)
            continue
        console.print(f"{name}: {reason}, building it …", highlight=False)
        # Written after every part, so that an interruption costs one part and not all.
        manifest[name] = {"recipe": recipe, "files": build()}
        files.write_text(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    console.print(_table(out, manifest))
    return manifest


# --- recipes: everything that decides what the files hold --------------------------------------------------------


def _model_recipe() -> dict[str, Any]:
    return {"generator": GENERATOR, "source": smollm2.REQUIREMENT, "gguf_sha256": smollm2.GGUF_SHA256}


def _data_recipe(source: str, seed: int) -> dict[str, Any]:
    return {"generator": GENERATOR, "source": source, "seed": seed}


def _maths_recipe(seed: int) -> dict[str, Any]:
    tasks = {name: task.config for name, task in maths.TASKS.items()}
    sizes = {"train_rows": maths.TRAIN_ROWS, "bench_rows": maths.BENCH_ROWS}
    return _data_recipe(maths.REQUIREMENT, seed) | {"tasks": tasks} | sizes


# --- parts: build one, and tell whether it needs building ----------------------------------------------------------


def _build_model(out: Path) -> dict[str, Any]:
    smollm2.export(out / "model")
    written_with = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf")}
    paths = sorted((out / "model").iterdir())
    return {f"model/{path.name}": {"sha256": files.file_sha256(path), "written_with": written_with} for path in paths}


def _build_data(out: Path, name: str, build: Callable[[int], tuple[list[Row], list[Row]]], seed: int) -> dict[str, Any]:
    described = {}
    for split, rows in zip(("train", "bench"), build(seed), strict=True):
        path = out / f"{name}.{split}.jsonl"
        write_jsonl(path, rows)
        counts = Counter(row.get("task", row["domain"]) for row in rows)
        described[path.name] = {
            "sha256": files.file_sha256(path),
            "rows": len(rows),
            "counts": dict(sorted(counts.items())),
        }
    return described


def _why_build(out: Path, name: str, recipe: dict[str, Any], entry: dict[str, Any] | None) -> str | None:
    """Why a part must be built, or None if what is there is right."""
    if entry is None:
        there = sorted(path.name for path in out.glob("*") if path.name.split(".")[0] == name)
        if there:
            raise UserError(
                f"{out}: holds {there[0]}, but its {MANIFEST} does not say where from, so nothing is overwritten; "
                "remove the folder or choose another --out"
            )
        return "not there yet"
    if entry["recipe"] != recipe:
        changed = sorted(key for key in entry["recipe"] | recipe if entry["recipe"].get(key) != recipe.get(key))
        return f"made with another {' and '.join(changed)}"
    for file, described in entry["files"].items():
        if not (out / file).is_file():
            return f"{file} is missing"
        if files.file_sha256(out / file) != described["sha256"]:
            return f"{file} was changed since"
    return None


def _read_manifest(out: Path) -> dict[str, Any]:
    path = out / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        # Looked at here, so that the rest need not ask what a manifest of another make might hold.
        assert all(isinstance(part["recipe"], dict) and part["files"].items() for part in manifest.values())
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise UserError(f"{path}: is damaged; remove the folder {out} or choose another --out") from error
    return manifest


def _table(out: Path, manifest: dict[str, Any]) -> Table:
    table = Table(title=str(out), title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("size", justify="right")
    table.add_column("rows", justify="right")
    table.add_column("of which")

    def size(names: Iterable[str]) -> str:
        return f"{sum((out / name).stat().st_size for name in names) / 1e6:.2f} MB"

    table.add_row("model/", size(manifest["model"]["files"]), "", smollm2.GGUF_FILE.removesuffix(".gguf"))
    for part in ("general", "maths"):
        for file, described in manifest[part]["files"].items():
            counts = ", ".join(f"{count} {name}" for name, count in described["counts"].items())
            table.add_row(file, size([file]), str(described["rows"]), counts)
    return table
