"""``python -m bench <command>``.

A command is a module with a docstring (its first line is the help), ``add_arguments(parser)`` and
``run(arguments) -> exit code``; it is listed here and imported when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "mlp": "bench.mlp",
    "op": "bench.op",
    "expand": "bench.expand",
    "step": "bench.step",
    "sweep": "bench.sweep",
    "all": "bench.all",
    "report": "bench.report",
    "decode": "bench.decode",
    "metrics": "bench.metrics",
    "host": "bench.host",
    "compile": "bench.compile",
    "tune": "bench.tune",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=COMMANDS, help="each has its own --help")
    name = parser.parse_args(argv[:1]).command
    command = importlib.import_module(COMMANDS[name])
    own = argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(own)
    return command.run(own.parse_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
