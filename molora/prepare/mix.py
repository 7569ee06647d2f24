"""``mix``: JSONL files as one, shuffled: the single-stage exercise of the recipe. And some of it apart, as a bench.

With a ratio, as many rows as there are without using one twice: ``--ratio 4:1`` of 50,000 and 40,000 rows takes 50,000
and 12,500.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from molora.errors import UserError
from molora.files import check_target
from molora.prepare.rows import Row, question_key, read_jsonl, write_jsonl
from molora.prepare.split import question

BENCH_ROWS = 200


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "mix",
        help="shuffle JSONL files into one",
        description="Shuffle any number of JSONL files into one. Rows are copied whole, their domain labels too.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="JSONL files to read")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    parser.add_argument("--ratio", metavar="N:N", help="rows of the files to one another (default: all rows of each)")
    parser.add_argument("--rows", type=int, metavar="N", help="with --ratio: at most so many rows in all")
    parser.add_argument("--bench", type=Path, metavar="FILE", help="hold questions out of --out, and write them here")
    parser.add_argument("--bench-rows", type=int, metavar="N", help=f"how many of them (default: {BENCH_ROWS})")
    parser.add_argument("--seed", type=int, default=42, help="of choice and shuffle (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files named by --out and --bench")
    parser.set_defaults(prepare=prepare)


def prepare(options: argparse.Namespace) -> None:
    if options.bench is None and options.bench_rows is not None:
        raise UserError("--bench-rows says how many rows --bench gets; give both")
    outputs = [options.out, *([options.bench] if options.bench else [])]
    for path in outputs:
        check_target(path, [*options.inputs, *(other for other in outputs if other is not path)])
        if path.exists() and not options.overwrite:
            raise UserError(f"{path}: exists already; choose another name, or replace it with --overwrite")
    parts = [read_jsonl(path) for path in options.inputs]
    if options.ratio:
        counts = shares([len(part) for part in parts], options.ratio, options.rows)
        # Each part draws for itself, so that another file beside it does not change what is taken of this one.
        parts = [random.Random(options.seed).sample(part, count) for part, count in zip(parts, counts, strict=True)]
    elif options.rows is not None:
        raise UserError("--rows says how many with --ratio; give both")
    rows = [row for part in parts for row in part]
    random.Random(options.seed).shuffle(rows)
    if options.bench:
        bench, rows = apart(rows, BENCH_ROWS if options.bench_rows is None else options.bench_rows)
        _write(options.bench, bench)
    _write(options.out, rows)


def _write(path: Path, rows: list[Row]) -> None:
    write_jsonl(path, rows)
    domains = Counter(str(row.get("domain", "no domain")) for row in rows)
    print(f"{path}: {len(rows)} rows ({', '.join(f'{count} {name}' for name, count in sorted(domains.items()))})")


def apart(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """One row of each of the first ``count`` questions, and the rows of all others: no question is in both."""
    try:
        keys = [question_key(question(row)) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError("--bench: a row has no messages, prompt or text to tell its question by") from error
    first = {key: row for key, row in zip(reversed(keys), reversed(rows), strict=True)}
    if not 0 < count < len(first):
        raise UserError(f"--bench-rows {count}: must be at least 1 and below {len(first)}, as many questions there are")
    bench = dict(islice(((key, first[key]) for key in dict.fromkeys(keys)), count))
    return list(bench.values()), [row for key, row in zip(keys, rows, strict=True) if key not in bench]


def shares(sizes: Sequence[int], ratio: str, most: int | None) -> list[int]:
    """How many rows of each file make the ratio, as many as there are; rounded down, but at least one."""
    try:
        weights = [float(weight) for weight in ratio.split(":")]
    except ValueError:
        weights = []
    if len(weights) != len(sizes) or not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f"--ratio {ratio}: write {len(sizes)} positive numbers, one a file: {':'.join('1' * len(sizes))}"
        )
    if most is not None and most < len(sizes):
        raise UserError(f"--rows {most}: must be at least one a file, {len(sizes)}")
    scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    if most is not None:
        scale = min(scale, most / sum(weights))
    return [max(1, int(scale * weight + 1e-6)) for weight in weights]
