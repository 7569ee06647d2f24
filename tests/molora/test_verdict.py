"""Every pattern of the verdict, the borders between them, and the command line."""

import json
import math
from pathlib import Path

import pytest

from molora import evaluate, verdict
from molora.errors import UserError
from molora.scores import BenchResult, Score
from molora.verdict import judge


def general(loss: float, rows: int = 100) -> list[BenchResult]:
    """Every row the same, so that intervals have no width."""
    return [BenchResult((Score(("all",), loss * 10, 10),) * rows, None, None)]


def maths(correct: int, rows: int = 100) -> list[BenchResult]:
    return [BenchResult(tuple(Score(("all",), 5.0, 10, "", i < correct) for i in range(rows)), None, None)]


@pytest.mark.parametrize(
    ("losses", "correct", "expected"),
    [
        ((3.0, 2.9, 2.9), (5, 6, 60), ("acquired", "acquired", "kept")),
        ((3.0, 2.9, 2.5), (5, 6, 60), ("acquired", "acquired", "kept")),
        ((3.0, 2.9, 3.0), (5, 6, 60), ("acquired", "acquired", "slightly declined")),
        ((3.0, 2.0, 2.2), (5, 6, 60), ("acquired", "acquired", "sharply declined")),
        ((3.0, 2.0, 2.2), (5, 6, 8), ("acquired", "not acquired", "sharply declined")),
        ((3.0, 2.9, 2.9), (5, 6, 8), ("acquired", "not acquired", "kept")),
        ((3.0, 2.9, 2.9), (60, 6, 5), ("acquired", "lost", "kept")),
        ((3.0, 3.1, 3.1), (5, 6, 60), ("not acquired", "acquired", "kept")),
        # the borders themselves are on the near side; one part in a thousand further is beyond
        ((2.0, 1.96, 1.96), (5, 6, 60), ("acquired", "acquired", "kept")),
        ((2.0, 1.962, 1.962), (5, 6, 60), ("not acquired", "acquired", "kept")),
        ((3.0, 2.0, 2.04), (5, 6, 60), ("acquired", "acquired", "kept")),
        ((3.0, 2.0, 2.042), (5, 6, 60), ("acquired", "acquired", "slightly declined")),
        ((3.0, 2.0, 2.1), (5, 6, 60), ("acquired", "acquired", "slightly declined")),
        ((3.0, 2.0, 2.102), (5, 6, 60), ("acquired", "acquired", "sharply declined")),
        # a resample has none of 4 better rows with probability e^-4 = 1.8 %, none of 3 with 5 %
        ((3.0, 2.9, 2.9), (0, 0, 4), ("acquired", "acquired", "kept")),
        ((3.0, 2.9, 2.9), (0, 0, 3), ("acquired", "not acquired", "kept")),
    ],
)
def test_patterns(losses: tuple, correct: tuple, expected: tuple[str, str, str]) -> None:
    found = judge([general(loss) for loss in losses], [maths(n) for n in correct])
    assert (found.general_after_stage1, found.maths_after_stage2, found.general_after_stage2) == expected
    assert found.overfit == (expected[1:] == ("acquired", "sharply declined"))
    said = " ".join(found.sentences)
    assert ("overfitting" in said and "fewer steps, or with a lower lr" in said) == found.overfit
    assert f"{losses[2] / losses[1] - 1:+.1%}" in said
    assert f"{correct[0]}% to {correct[2]}%" in said
    assert ("more steps" in said) == (expected[1] != "acquired" and expected[2] != "sharply declined")


def test_a_change_that_is_not_sure_is_said_to_be_so() -> None:
    before = [BenchResult((Score(("all",), 20.0, 10),) * 30, None, None)]
    after = [BenchResult((*(Score(("all",), 20.0, 10),) * 28, *(Score(("all",), 26.0, 10),) * 2), None, None)]
    found = judge([before, before, after], [maths(1), maths(1), maths(50)])
    assert found.general_after_stage2 == "kept"
    assert "reaches from kept to slightly declined" in found.sentences[-1]


def test_nothing_has_no_sign() -> None:
    found = judge([general(2.0), general(1.9999), general(1.9999)], [maths(1), maths(1), maths(50)])
    assert "(loss +0.0%, 95 % interval +0.0% to +0.0% against base)" in found.sentences[0]


def test_without_answers_maths_is_judged_by_its_loss() -> None:
    found = judge([general(2.0)] * 3, [general(2.0), general(2.0), general(1.0)])
    assert found.maths_after_stage2 == "acquired"
    assert "2.000 to 1.000 loss" in found.sentences[1]


def write_results(path: Path, models: dict[str, tuple[float, int]], rows: int = 100, content: str = "1") -> Path:
    results = []
    for model, (loss, correct) in models.items():
        for bench, (result,) in (("g.jsonl", general(loss, rows)), ("m.jsonl", maths(correct))):
            results.append({"model": model, "bench": bench} | result.to_json())
    data = {"g.jsonl": content, "m.jsonl": "2"}
    path.write_text(json.dumps({"provenance": {"data": data}, "results": results}))
    return path


def test_command_line_on_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_results(tmp_path / "1.json", {"base": (3.0, 5), "s1": (2.0, 5)})
    two = write_results(tmp_path / "2.json", {"s2": (2.5, 50)})
    verdict.main([str(one), str(two), "--output", str(tmp_path / "verdict.json")])
    assert "That is overfitting to maths" in " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "verdict.json").read_text())
    assert written["overfit"] and written["general2"]["value"] == pytest.approx(0.25)


def test_command_line_measures_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(options) -> dict:
        assert (options.model, options.bench, options.limit) == (["a", "b", "c"], ["g", "m"], 3)
        return {name: {"g": general(2.0)[0], "m": maths(5)[0]} for name in options.model}

    monkeypatch.setattr(evaluate, "measured", measured)
    models = [part for name in "abc" for part in ("--model", name)]
    verdict.main([*models, "--bench", "g", "--bench", "m", "--limit", "3"])
    assert "Stage 2: maths not acquired" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give files of results, or three times --model"),
        (["{two}"], "needs three models"),
        (["--model", "a", "--model", "b", "--model", "a", "--bench", "absent"], "needs three models.*here are a, b"),
        (["{nan}"], "the general bench: a model's loss is not finite"),
        (["{three}", "--model", "x"], "and not both"),
        (["{three}", "--maths", "other"], "--maths: which bench"),
        (["{broken}"], "not results of python -m molora.evaluate"),
        (["{missing}"], "not results of python -m molora.evaluate"),
        (["{three}", "--output", "{three}"], "is read here"),
        (["{two}", "{fewer}"], r"^[^(]*fewer.json: g.jsonl is of other rows than in .*two.json"),
        (["{two}", "{changed}"], r"^[^(]*changed.json: g.jsonl is of other rows than in .*two.json"),
    ],
)
def test_command_line_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    files = {
        "two": write_results(tmp_path / "two.json", {"a": (1.0, 1), "b": (1.0, 1)}),
        "three": write_results(tmp_path / "three.json", {"a": (1.0, 1), "b": (1.0, 1), "c": (1.0, 1)}),
        "fewer": write_results(tmp_path / "fewer.json", {"c": (1.0, 1)}, rows=99),
        "changed": write_results(tmp_path / "changed.json", {"c": (1.0, 1)}, content="3"),
        "nan": write_results(tmp_path / "nan.json", {"a": (1.0, 1), "b": (math.nan, 1), "c": (1.0, 1)}),
        "broken": tmp_path / "broken.json",
        "missing": tmp_path / "missing.json",
    }
    files["broken"].write_text('{"results": [{"model": 1}]}')
    with pytest.raises(UserError, match=message):
        verdict.main([part.format(**files) for part in arguments])
