"""The patterns of the verdict and their thresholds."""

import pytest

from molora.verdict import judge


@pytest.mark.parametrize(
    ("general", "correct", "expected"),
    [
        ((3.0, 2.9, 2.9), (5, 6, 60), ("acquired", "acquired", "kept")),
        ((3.0, 2.99, 3.04), (5, 6, 60), ("not acquired", "acquired", "kept")),
        ((3.0, 2.9, 3.0), (5, 6, 8), ("acquired", "not acquired", "slightly declined")),
        ((3.0, 2.0, 2.2), (5, 6, 60), ("acquired", "acquired", "declined")),
    ],
)
def test_verdict(general: tuple, correct: tuple, expected: tuple[str, str, str]) -> None:
    verdict = judge(general, tuple((n, 100) for n in correct))
    assert (verdict.general_after_stage1, verdict.maths_after_stage2, verdict.general_after_stage2) == expected
    assert ("overfitting" in verdict.sentence) == (expected[1:] == ("acquired", "declined"))
    assert f"{general[2] / general[1] - 1:+.1%}" in verdict.sentence
