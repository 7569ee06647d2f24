"""What counts as the right answer, and the interval around a share of right answers."""

import pytest

from molora.answers import is_correct, wilson_interval
from molora.errors import UserError


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("-5", "-5"),
        ("-5", "4 - 9 = -5"),
        ("-5", "The answer is \N{MINUS SIGN}5."),
        ("-5", "The answer is - 5."),
        ("-7", "The answer is:-7."),
        ("42", "The answer is 42."),
        ("42", "12 + 30 = 42"),
        ("42", "The answer is **42**."),
        ("42", r"so \boxed{42}, as 40 + 2 shows"),
        ("42", "$41$ would be too few, so the answer is $42$."),
        ("42", "I had 41, but the answer is 42"),
        ("1000", "1,000"),
        ("1,000", "The answer is 1000."),
        ("20103", "11050-1750=9300\n15263+4840=20103\nThe answer is 20103."),
        ("12", "12.0"),
        ("5", r"It costs \$5."),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", r"\boxed{1/2}"),
        (r"$2+\sqrt{3}$", r"\boxed{\sqrt{3}+2}"),
        ("116", "15*6=90, 26+90=116\nThe answer is 116."),
    ],
)
def test_right(gold: str, prediction: str) -> None:
    assert is_correct(gold, prediction)


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("42", ""),
        ("42", "I do not know."),
        ("42", "The answer is 42. Wait, the answer is 43."),
        ("42", "4.2"),
        ("-5", "The answer is 5."),
        ("5", "The answer is -5."),
        ("1000", "The answer is 1000000."),
        ("7", "3 + 4"),  # the problem again, not its answer
        ("17", "12 + 5 = ?"),
        ("12", "3*4"),
        ("7", "3 + 4 = 8"),
    ],
)
def test_wrong(gold: str, prediction: str) -> None:
    assert not is_correct(gold, prediction)


def test_answer_that_cannot_be_read() -> None:
    with pytest.raises(UserError, match="no idea"):
        is_correct("no idea", "42")


def test_wilson_interval_against_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for correct, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_of_no_proportion(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(correct, total)
