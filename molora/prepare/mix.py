"""``mix``: several JSONL files as one, shuffled: the single-stage exercise of the recipe."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

from molora.errors import UserError
from molora.prepare.rows import read_jsonl, write_jsonl


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "mix",
        help="shuffle JSONL files into one",
        description="Shuffle any number of JSONL files into one. Rows are copied whole, their domain labels too.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="JSONL files to read")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file named by --out")
    parser.set_defaults(prepare=prepare)


def prepare(options: argparse.Namespace) -> None:
    if options.out.exists() and not options.overwrite:
        raise UserError(f"{options.out}: exists already; choose another --out, or replace it with --overwrite")
    rows = [row for path in options.inputs for row in read_jsonl(path)]
    random.Random(options.seed).shuffle(rows)
    write_jsonl(options.out, rows)
    domains = Counter(str(row.get("domain", "no domain")) for row in rows)
    print(
        f"{options.out}: {len(rows)} rows ({', '.join(f'{count} {name}' for name, count in sorted(domains.items()))})"
    )
