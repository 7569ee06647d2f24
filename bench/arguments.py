"""What options may say. A mistake of whoever calls is found before anything is measured, and told in one line.

Of molora nothing is imported here: kernels are measured without pydantic.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any


class Mistake(ValueError):
    """The caller's, who can mend it: one line and exit code 2, without a traceback."""


def count(text: str, least: int = 0) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: is no whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
    return number


def positive(text: str) -> int:
    return count(text, 1)


def several(text: str) -> int:
    return count(text, 2)


def probability(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: is no number") from None
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0 and below 1")
    return number


def device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text}: must be cpu, cuda, or one of several such as cuda:1")
    return text


KINDS: dict[str, Any] = {"seed": count, "layers": count, "dropout": probability, "device": device}
"""Of a shape's fields; other numbers are positive."""


def add_shape(
    parser: argparse.ArgumentParser,
    shape: Any,
    *,
    without: Iterable[str] = (),
    filled: bool = True,
    **choices: Collection[str],
) -> None:
    """An option for each field of a shape. Unless ``filled``, one that is not given is None."""
    for name, default in asdict(shape).items():
        if name not in without:
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=KINDS.get(name, positive if isinstance(default, int) else str),
                default=default if filled else None,
                choices=choices.get(name),
                help=f"(default: {default})",
            )


def add_run(parser: argparse.ArgumentParser) -> None:
    """How often all is measured, and where the result goes."""
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--warmup", type=count, default=3)
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--json", metavar="FILE", help="write the rows with provenance here")


def check_top_k(top_k: int, experts: int) -> None:
    if top_k > experts:
        raise Mistake(f"--top-k {top_k}: is more than the {experts} experts")


def check(options: argparse.Namespace) -> None:
    """Raise :class:`Mistake` for a device that is not there, and a file that cannot be written."""
    for name in ("json", "markdown"):
        if (path := getattr(options, name, None)) is not None:
            _check_target(f"--{name} {path}", Path(path))
    wanted = re.fullmatch(r"cuda(?::(\d+))?", str(getattr(options, "device", "")))
    if wanted and not getattr(options, "list", False):
        import torch  # a second, which what needs no device need not wait

        if int(wanted[1] or 0) >= torch.cuda.device_count():
            raise Mistake(f"--device {wanted[0]}: there is no such device here; --device cpu needs none")


def _check_target(said: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise Mistake(f"{said}: is no file, and one is to be written; choose another name")
        tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent).close()
    except OSError as error:
        raise Mistake(f"{said}: cannot be written ({error.strerror or error})") from error
