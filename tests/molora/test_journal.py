"""A journal gives back what it was given, to its own key only, after a crash and beside other processes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from molora.errors import UserError
from molora.journal import Journal


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    journal = Journal({"model": 1}, path)
    journal.add("loss", {3: [1.5, 2], 0: [0.5, 1]}, tokens=10, seconds=2.0)
    journal.add("loss", {1: [2.5, 3]}, tokens=20, seconds=1.0)
    journal.add("answers", {0: ["한글", True]}, tokens=5, seconds=1.0)
    for one in (journal, Journal({"model": 1}, path)):
        assert one.rows("loss") == {3: [1.5, 2], 0: [0.5, 1], 1: [2.5, 3]}
        assert one.rows("answers") == {0: ["한글", True]}
        assert (one.speed("loss"), one.speed("answers"), one.seconds) == (10.0, 5.0, 4.0)
        assert one.rows("other") == {} and one.speed("other") is None
        assert not one.finished(1)
    journal.finish(4)
    again = Journal({"model": 1}, path)
    assert again.finished(4) and again.finished(2) and not again.finished(5)


def test_a_line_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    journal = Journal({}, path)
    journal.add("loss", {0: [1.0, 1]}, 1, 1.0)
    journal.add("loss", {1: [2.0, 1]}, 1, 1.0)
    path.write_bytes(path.read_bytes()[:-7])
    cut = Journal({}, path)
    assert cut.rows("loss") == {0: [1.0, 1]}
    cut.add("loss", {1: [3.0, 1]}, 1, 1.0)
    assert Journal({}, path).rows("loss") == {0: [1.0, 1], 1: [3.0, 1]}


def test_another_key_starts_anew(tmp_path: Path) -> None:
    Journal({"model": 1}, tmp_path / "a.jsonl").add("loss", {0: [1.0, 1]}, 1, 1.0)
    assert Journal({"model": 2}, tmp_path / "a.jsonl").rows("loss") == {}


def test_opening_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    Journal({}, path)
    assert not path.parent.exists()
    Journal({}, path).add("loss", {0: [1.0, 1]}, 1, 1.0)
    torn = path.read_bytes() + b'{"key": "'
    path.write_bytes(torn)
    assert Journal({}, path).rows("loss") == {0: [1.0, 1]}
    assert path.read_bytes() == torn


def test_two_that_are_open_at_once_keep_each_others_lines(tmp_path: Path) -> None:
    one, other = Journal({}, tmp_path / "a.jsonl"), Journal({}, tmp_path / "a.jsonl")
    one.begin()
    one.add("loss", {0: [1.0, 1]}, 1, 1.0)
    other.begin()
    other.add("loss", {1: [2.0, 1]}, 1, 1.0)
    one.finish(1)
    Journal({}, tmp_path / "a.jsonl")
    one.add("loss", {2: [3.0, 1]}, 1, 1.0)
    found = Journal({}, tmp_path / "a.jsonl")
    assert found.rows("loss") == {0: [1.0, 1], 1: [2.0, 1], 2: [3.0, 1]} and found.finished(1)


def test_writers_at_once(tmp_path: Path) -> None:
    """Threads, each with an open file of its own for every line, as processes have."""
    path = tmp_path / "a.jsonl"

    def write(first: int) -> None:
        journal = Journal({}, path)
        for i in range(first, first + 200):
            journal.add("loss", {i: "x" * 5000}, 1, 1.0)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, [0, 200, 400]))
    assert Journal({}, path).rows("loss") == dict.fromkeys(range(600), "x" * 5000)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Journal({}, tmp_path / "file" / "a.jsonl").begin()
