"""The command line: ``python -m molora.prepare quickstart | mix``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from molora.cli import run
from molora.prepare import mix, quickstart

# Each module adds its own sub-command: add_parser(subparsers) names the options and the function that gets them.
SUBJECTS = (quickstart, mix)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m molora.prepare", description="Prepare models and data as files.")
    subparsers = parser.add_subparsers(metavar="WHAT", required=True)
    for subject in SUBJECTS:
        subject.add_parser(subparsers)
    options = parser.parse_args(argv)
    options.prepare(options)


if __name__ == "__main__":
    run(main)
