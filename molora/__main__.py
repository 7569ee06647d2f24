"""``python -m molora``: the commands that there are, from the package's docstring."""

from __future__ import annotations

import argparse

import molora


def main(arguments: list[str] | None = None) -> None:
    """Print the list; ``arguments`` default to the process's own, and there are none but ``--help``."""
    _, start, rest = (molora.__doc__ or "").partition("    python -m")
    parser = argparse.ArgumentParser(
        prog="python -m molora.COMMAND",
        description=f"commands:\n{start}{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    parser.print_help()


if __name__ == "__main__":
    main()
