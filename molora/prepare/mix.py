"""``mix``: several JSONL files as one, shuffled: the single-stage exercise of the recipe.

With a ratio, as many rows as there are without using one twice: ``--ratio 4:1`` of 50,000 and 40,000 rows takes 50,000
and 12,500.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from molora.errors import UserError
from molora.files import check_target
from molora.prepare.rows import read_jsonl, write_jsonl


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
    parser.add_argument("--seed", type=int, default=42, help="of choice and shuffle (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file named by --out")
    parser.set_defaults(prepare=prepare)


def prepare(options: argparse.Namespace) -> None:
    check_target(options.out, options.inputs)
    if options.out.exists() and not options.overwrite:
        raise UserError(f"{options.out}: exists already; choose another --out, or replace it with --overwrite")
    parts = [read_jsonl(path) for path in options.inputs]
    if options.ratio:
        counts = shares([len(part) for part in parts], options.ratio, options.rows)
        # Each part draws for itself, so that another file beside it does not change what is taken of this one.
        parts = [random.Random(options.seed).sample(part, count) for part, count in zip(parts, counts, strict=True)]
    elif options.rows is not None:
        raise UserError("--rows says how many with --ratio; give both")
    rows = [row for part in parts for row in part]
    random.Random(options.seed).shuffle(rows)
    write_jsonl(options.out, rows)
    domains = Counter(str(row.get("domain", "no domain")) for row in rows)
    print(
        f"{options.out}: {len(rows)} rows ({', '.join(f'{count} {name}' for name, count in sorted(domains.items()))})"
    )


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
