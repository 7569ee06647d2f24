"""What all command lines of molora share: options for a model, and the end, where an error that the user can mend is
one line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from molora.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "int4")


def add_model_options(
    parser: argparse.ArgumentParser, precisions: Sequence[str] = PRECISIONS, auto: str = "the device's"
) -> None:
    """``--device`` and ``--precision``, as :func:`molora.load` takes them, or with another meaning of ``auto``."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--precision", default="auto", choices=precisions, help=f"of the base (default: {auto})")


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise :class:`UserError` if one of these options is given and below 1."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def run(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and exit: 0 when it returns, 2 after a line ``error: …`` for a :class:`UserError` or a full disk,
    130 when interrupted, 1 when nobody reads the output any more (``| head``).

    Any other exception is a bug of ours and keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # as Python does for stderr: what cannot be shown costs no result
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        print("stopped: nobody reads the output any more", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain once more when it flushes at the end
        sys.exit(1)
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # what has not been imported has not raised
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        told = " ".join(str(error).split())
        print(
            f"error: the GPU's memory is full ({told}); lower the batch size, or keep the base in 4 bits (int4)",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"error: {error.filename}: {error.strerror}; give a shorter one", file=sys.stderr)
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'writing'}: {error.strerror}; make room and try again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
