"""``python -m bench <command>``.

A command is a module with a docstring (its first line is the help), ``add_arguments(parser)`` and
``run(options) -> exit code``; it is listed here and imported when it is asked for. A mistake in the options is one line
and exit code 2. When interrupted, it says where it was.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from bench import arguments

COMMANDS = {
    "mlp": "bench.mlp",
    "op": "bench.op",
    "expand": "bench.expand",
    "step": "bench.step",
    "recipe": "bench.recipe",
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
    options = own.parse_args(argv[1:])
    try:
        arguments.check(options)
        return command.run(options)
    except ValueError as error:
        # Where molora was not imported, it has not raised: most commands run without it, and without pydantic.
        errors = sys.modules.get("molora.errors")
        if not isinstance(error, (arguments.Mistake, errors.UserError) if errors else arguments.Mistake):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
