"""The command line: ``python -m molora.prepare WHAT``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from molora.cli import run
from molora.prepare import check, convert, general_en_ko, mix, openr1_math, quickstart

# Each module adds its own sub-command: add_parser(subparsers) names the options and the function that gets them.
SUBJECTS = (quickstart, general_en_ko, openr1_math, mix, convert, check)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    options.prepare(options)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line, with ``prepare``, the function that gets them."""
    parser = argparse.ArgumentParser(prog="python -m molora.prepare", description="Prepare models and data as files.")
    subparsers = parser.add_subparsers(metavar="WHAT", required=True)
    for subject in SUBJECTS:
        subject.add_parser(subparsers)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
