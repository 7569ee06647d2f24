"""Groups, round trips and tables of what models scored."""

import json

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
        for name, loss, correct in [("base", 2.5, 0), ("stage1", 2.25, 1), ("stage2", 2.0, 2)]
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
    result = BenchResult((Score(("all", "maths"), 1.5, 3, "5", True), Score(("all",))), 12.0, None)
    assert BenchResult.from_json(json.loads(json.dumps(result.to_json()))) == result
