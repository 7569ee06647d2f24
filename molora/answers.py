"""Is an answer right, and how sure is a share of right answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from molora.errors import UserError

# What math-verify 0.9 does not read: a minus sign that is not ASCII, a number right after a colon, an escaped currency
# sign, and a sign set apart from its number ("is - 5").
_RESPELLED = (
    (re.compile("[−‒–—](?=\\s?\\d)"), "-"),  # noqa: RUF001 # these are the signs meant
    (re.compile(r"\\\$(?=\d)"), ""),
    (re.compile(r"(?<=:)(?=-?\d)"), " "),
    (re.compile(r"(?<=\b(?:is|be)\s)-\s+(?=\d)"), "-"),
)


def is_correct(gold: str, prediction: str) -> bool:
    """Whether the final answer in the text ``prediction`` equals ``gold``, mathematically.

    Both are read by `math-verify <https://github.com/huggingface/Math-Verify>`_: a ``\\boxed{}`` or ``answer is``
    first, else the last formula or number; ``1,000`` equals ``1000`` and ``1/2`` equals ``0.5``. Where ``gold`` is a
    number, an arithmetic expression left undone (``9 - 7``) is no answer, else repeating the problem would solve it.
    A text without anything mathematical is wrong; so is one on which math-verify runs into its time limit.

    Call it from the main thread: math-verify's time limit is a signal. Raises :class:`UserError` as
    :func:`check_gold`.
    """
    parse, verify = _math_verify()
    expected = check_gold(gold)
    found = parse(_respelled(prediction))
    if not found or (getattr(expected[0], "is_Number", False) and _left_undone(found[0])):
        return False
    return bool(verify(expected, found))


def check_gold(gold: str, where: str = "") -> list[Any]:
    """``gold`` as math-verify reads it. Raises :class:`UserError` if it cannot, or if the package is missing."""
    parse, _ = _math_verify()
    expected = parse(_respelled(gold))
    if not expected:
        place = f"{where}: " if where else ""
        raise UserError(f"{place}the answer {gold!r} is nothing that math-verify can read; write a number or LaTeX")
    return expected


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson, J. Am. Stat. Assoc. 22, 1927, p. 209); z = 1.96 is 95 %.

    Unlike the textbook interval it stays inside [0, 1] and keeps a width where nothing, or everything, was right.
    Raises ValueError unless 0 <= correct <= total and total > 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total} is no proportion")
    share, shrink = correct / total, z * z / total
    centre = (share + shrink / 2) / (1 + shrink)
    half = z / (1 + shrink) * math.sqrt(share * (1 - share) / total + shrink / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def _math_verify() -> Sequence[Any]:
    # Imported when needed: it brings sympy, which is slow to import, and it is an extra.
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("comparing answers needs the package math-verify: pip install math-verify") from None
    return parse, verify


def _respelled(text: str) -> str:
    for pattern, replacement in _RESPELLED:
        text = pattern.sub(replacement, text)
    return text


def _left_undone(value: Any) -> bool:
    """Whether a parsed value has a sum or a product of whole numbers left to work out; ``1/2`` and ``50%`` have not."""
    from sympy import Add, Expr, Integer, Mul

    if not isinstance(value, Expr):
        return False
    return value.has(Add) or sum(isinstance(factor, Integer) for factor in Mul.make_args(value)) > 1
