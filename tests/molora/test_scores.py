"""Groups, round trips, differences and tables of what models scored."""

import json
import math

import numpy as np
import pytest
from rich.console import Console

from molora import scores
from molora.scores import BenchResult, Score

ROWS = [
    {"prompt": "what is one", "response": "a plain answer", "domain": "general", "language": "en"},
    {"prompt": "six", "response": "it is a few", "domain": "general", "language": "ko"},
    {"prompt": "sum of one two", "response": "three", "answer": "3", "domain": "maths", "task": "sum"},
    {"prompt": "four is what", "response": "four", "answer": "4", "domain": "maths", "task": "echo"},
    {"prompt": "five", "response": "five words it is", "answer": "5", "domain": "maths", "task": "echo"},
]


def result(group: str, loss: float, correct: int | None = None) -> BenchResult:
    rows = [Score(("all", group), loss=loss * 10, tokens=10)] * 2
    if correct is not None:
        tasks = (f"{group}/sum", f"{group}/echo")
        rows = [
            Score((*row.groups, task), row.loss, row.tokens, "", i < correct)
            for i, (row, task) in enumerate(zip(rows, tasks, strict=True))
        ]
    return BenchResult(tuple(rows), 1234.0, 56.0 if correct is not None else None)


def test_table_fits_a_terminal_and_shows_every_number() -> None:
    results = {
        name: {"general": result("general-ko", loss), "maths": result("maths", loss / 2, correct)}
        for name, loss, correct in [
            ("a/long/way/to/the/base", 2.5, 0),
            ("a/long/way/to/stage1_general_sft/final", 2.25, 1),
            ("a/long/way/to/stage2_reasoning_sft/final", 2.0, 2),
        ]
    }
    console = Console(width=80, record=True)
    console.print(scores.columns(results, "title"))
    shown = console.export_text()
    for text in (
        "2.5000",
        "1.0000",
        "0 % (0 to 66)",
        "50 % (9 to 91)",
        "100 % (34 to 100)",
        "1,234",
        "56",
        "  maths/echo",
        "stage1_general_sft ",
        "stage2_reasoning_ ",  # and the rest below it
    ):
        assert text in shown
    assert "…" not in shown


def test_groups() -> None:
    def result(*rows: dict) -> BenchResult:
        return BenchResult(tuple(Score(scores.groups_of(row)) for row in rows), None, None)

    assert result(*ROWS).groups() == [
        "all", "general", "general/en", "general/ko", "maths", "maths/sum", "maths/echo",
    ]  # fmt: skip
    assert result(*ROWS[2:]).groups() == ["maths", "maths/sum", "maths/echo"]
    assert result(ROWS[3]).groups() == ["maths/echo"]
    assert result({"prompt": "a", "response": "b"}).groups() == ["all"]


def test_json_round_trip() -> None:
    result = BenchResult((Score(("all", "maths"), 1.5, 3, "5", True), Score(("all",))), 12.0, None, 2.5)
    assert BenchResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def scored(losses: np.ndarray, tokens: np.ndarray, correct: np.ndarray | None = None) -> BenchResult:
    right = [None] * len(losses) if correct is None else [bool(value) for value in correct]
    rows = [Score(("all",), float(a), int(n), "", c) for a, n, c in zip(losses, tokens, right, strict=True)]
    return BenchResult(tuple(rows), None, None)


def test_difference_is_the_bootstrap_of_scipys_definition() -> None:
    """Against scipy.stats.bootstrap's percentile interval; both draw at random, so they agree as far as draws do."""
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(3)
    tokens = draw.integers(5, 50, size=120)
    old = tokens * draw.normal(2.0, 0.4, size=120)
    new = old - tokens * draw.normal(0.05, 0.2, size=120)
    found = scores.difference([scored(old, tokens)], [scored(new, tokens)])
    assert found is not None
    assert found.value == pytest.approx((new.sum() - old.sum()) / tokens.sum())

    def statistic(a, b, n, axis):
        return (b.sum(axis) - a.sum(axis)) / n.sum(axis)

    expected = stats.bootstrap(
        (old, new, tokens), statistic, paired=True, method="percentile", n_resamples=10_000, rng=5, vectorized=True
    ).confidence_interval
    width = expected.high - expected.low
    assert found.interval_95 == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    assert scores.difference([scored(old, tokens)], [scored(new, tokens)]) == found


def test_p_of_exact_match_is_the_chance_of_a_resample_on_the_other_side() -> None:
    """12 rows of 100 got better and 3 worse. How often a resample has no more better rows than worse ones is a sum over
    the multinomial distribution, which 10,000 resamples meet within their standard error (here four of them)."""
    old, new, ones = np.zeros(100), np.zeros(100), np.ones(100)
    new[:12] = 1
    old[12:15] = 1
    found = scores.difference([scored(ones, ones, old)], [scored(ones, ones, new)], measure="exact_match")
    assert found is not None and found.significant
    assert found.value == pytest.approx(0.09)
    other_side = sum(
        math.comb(100, worse)
        * math.comb(100 - worse, better)
        * 0.12**better
        * 0.03**worse
        * 0.85 ** (100 - worse - better)
        for worse in range(40)
        for better in range(worse + 1)
    )
    error = math.sqrt(other_side / scores.RESAMPLES)
    assert found.p == pytest.approx(2 * other_side, abs=2 * 4 * error)
    same = scores.difference([scored(ones, ones, old)], [scored(ones, ones, old)], measure="exact_match")
    assert same is not None and (same.value, same.interval_95, same.p, same.significant) == (0, (0, 0), 1, False)


def test_pairing_is_what_makes_a_small_change_on_unlike_rows_visible() -> None:
    tokens = np.full(50, 10)
    old = np.linspace(1, 100, 50)
    found = scores.difference([scored(old, tokens)], [scored(old + 0.1, tokens)])
    assert found is not None and found.significant and found.value == pytest.approx(0.01)
    shuffled = scores.difference([scored(old, tokens)], [scored(old[::-1] + 0.1, tokens)])
    assert shuffled is not None and not shuffled.significant


def test_differences_of_several_seeds_and_of_rows_not_measured() -> None:
    tokens = np.array([10, 10, 0])
    base = scored(np.array([20.0, 30.0, 0.0]), tokens)
    seeds = [scored(np.array([10.0, 30.0, 0.0]), tokens), scored(np.array([20.0, 20.0, 5.0]), np.array([10, 10, 5]))]
    found = scores.difference([base], seeds)
    assert found is not None
    assert (found.value, found.rows) == (pytest.approx(-0.5), 2)  # (15 + 25) / 20 - 50 / 20
    relative = scores.difference([base], seeds, relative=True)
    assert relative is not None and relative.value == pytest.approx(-0.2)
    assert scores.difference([base], seeds, measure="exact_match") is None
    assert scores.differences([base], seeds)["all"]["loss"]["rows"] == 2
    with pytest.raises(ValueError, match="different benches"):
        scores.difference([base], [result("general", 1.0)])


def test_a_loss_that_is_no_number_is_never_significant() -> None:
    tokens = np.full(50, 10)
    old = np.linspace(1, 100, 50)
    found = scores.difference([scored(old, tokens)], [scored(np.append(old[1:], math.nan), tokens)])
    assert found is not None and not found.significant
    assert "*" not in scores.difference_cell(found)
    assert found.p > 0.5


def test_benches_of_one_name_are_told_apart() -> None:
    results = {"a": {bench: result("maths", 2, 0) for bench in ("one/b.jsonl", "two/b.jsonl", "one/c.jsonl")}}
    console = Console(width=140, record=True)
    console.print(scores.comparison(results, "a", "title"))
    shown = console.export_text()
    assert all(name in shown for name in ("one/b.jsonl", "two/b.jsonl", "c.jsonl")) and "one/c.jsonl" not in shown


@pytest.mark.parametrize("rows", [scores.FEWEST_ROWS, scores.FEWEST_ROWS - 1])
def test_comparison_shows_differences_from_the_baseline_alone(rows: int) -> None:
    """A star where they are no chance: of fewer rows, all changing alike would be so in more than 5 % of cases."""
    made = {"a": Score(("all",), 20.0, 10, "", False), "b": Score(("all",), 10.0, 10, "", True)}
    results = {name: {"b.jsonl": BenchResult((row,) * rows, None, None)} for name, row in made.items()}
    console = Console(width=140, record=True)
    console.print(scores.comparison(results, "a", "title"))
    shown, star = console.export_text(), "*" if 2 / 2**rows < 0.05 else " "
    assert f"-1.0000 (-1.0000 to -1.0000){star}" in shown and "+1.0000" not in shown
    assert f"+100.0 (+100.0 to +100.0){star}" in shown


def test_comparison_cuts_nothing_off_in_a_narrow_terminal() -> None:
    rows = tuple(Score(("all",), loss=2.0 + i, tokens=1, prediction="1", correct=i % 2 == 0) for i in range(8))
    models = ("base", "outputs/tutorial/stage1/final", "outputs/tutorial/stage2/final")
    console = Console(width=80, record=True)
    console.print(
        scores.comparison({m: {"maths.bench.jsonl": BenchResult(rows, None, None)} for m in models}, "base", "t")
    )
    shown = console.export_text()
    assert "stage1" in shown and "stage2" in shown and "tutorial" not in shown and "…" not in shown
