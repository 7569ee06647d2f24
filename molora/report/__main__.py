"""The command line of :mod:`molora.report`."""

from __future__ import annotations

import argparse

from molora import cli
from molora.report import routing, run


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` default to the process's own. Raises :class:`UserError` for bad input."""
    parser = argparse.ArgumentParser(prog="python -m molora.report", description="Reports on routing and on runs.")
    commands = parser.add_subparsers(required=True, metavar="routing|run")
    routing.add_command(commands)
    run.add_command(commands)
    options = parser.parse_args(arguments)
    options.command(options)


if __name__ == "__main__":
    cli.run(main)
