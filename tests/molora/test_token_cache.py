from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from molora import chat, data, token_cache
from tests.conftest import CHATML, make_rows, make_tokenizer

Count = Callable[[], int]
ROWS = [row | {"where": f"x:{i}"} for i, row in enumerate(make_rows(9))]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return token_cache.folder()


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> Count:
    """How many rows have been tokenised so far."""
    rows: list[Any] = []
    alive = chat.encode_row

    def encode_row(*given: Any) -> chat.Encoded:
        rows.append(given)
        return alive(*given)

    monkeypatch.setattr(chat, "encode_row", encode_row)
    return lambda: len(rows)


def encode(tokenizer: Any, rows: list[dict[str, str]] = ROWS, length: int = 64) -> data.Examples:
    return data.encode_rows(tokenizer, rows, length, cache=True)


def assert_same(one: data.Examples, other: data.Examples) -> None:
    assert (len(one), one.truncated, one.dropped) == (len(other), other.truncated, other.dropped)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)
        assert (a.domain, a.where) == (b.domain, b.where)


def test_the_second_time_nothing_is_tokenised_and_the_rows_are_the_same(
    chat_tokenizer: PreTrainedTokenizerFast, tokenised: Count, folder: Path
) -> None:
    silent = {"prompt": "one", "response": "two " * 99, "where": "x:9"}
    dropped = {"messages": [{"role": "user", "content": "one"}], "where": "x:10"}
    rows = [*ROWS, silent, dropped]
    first = encode(chat_tokenizer, rows)
    assert (first.truncated, first.dropped) == (1, 1)
    assert tokenised() == len(rows)
    assert_same(first, encode(chat_tokenizer, rows))
    assert_same(first, data.encode_rows(chat_tokenizer, rows, 64))  # without cache
    assert tokenised() == 2 * len(rows)
    assert len(list(folder.iterdir())) == 1


def test_where_rows_come_from_is_not_part_of_their_content(
    chat_tokenizer: PreTrainedTokenizerFast, tokenised: Count
) -> None:
    encode(chat_tokenizer)
    moved = [row | {"where": f"y:{i}", "domain": "other"} for i, row in enumerate(ROWS)]
    examples = encode(chat_tokenizer, moved)
    assert tokenised() == len(ROWS)
    assert (examples.rows[3].where, examples.rows[3].domain) == ("y:3", "other")


@pytest.mark.parametrize("changes", ["a row", "their order", "max_length", "template", "vocabulary", "end of sequence"])
def test_whatever_the_tokens_depend_on_changes_the_entry(changes: str, tokenised: Count) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML, bos=False)
    encode(tokenizer)
    rows, length = ROWS, 64
    if changes == "a row":
        rows = [*ROWS[:-1], ROWS[-1] | {"response": "other"}]
    elif changes == "their order":
        rows = ROWS[::-1]
    elif changes == "max_length":
        length = 63
    elif changes == "template":
        tokenizer.chat_template = CHATML.replace("Be brief.", "Be long.")
    elif changes == "vocabulary":
        tokenizer.add_tokens(["seven"])
    else:
        tokenizer.eos_token = "<|end|>"
    found = encode(tokenizer, rows, length)
    assert tokenised() == 2 * len(ROWS)
    assert_same(found, data.encode_rows(tokenizer, rows, length))


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "another's"])
def test_a_damaged_entry_is_told_and_made_again(
    how: str, chat_tokenizer: PreTrainedTokenizerFast, tokenised: Count, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = encode(chat_tokenizer)
    [path] = folder.iterdir()
    content = path.read_bytes()
    if how == "another's":
        save_file({name: tensor + 1 for name, tensor in load_file(path).items() if name != "truncated"}, path)
    else:
        flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        path.write_bytes({"cut": content[:-8], "flipped": flipped, "empty": b""}[how])
    assert_same(expected, encode(chat_tokenizer))
    assert "is damaged" in caplog.text
    assert tokenised() == 2 * len(ROWS)
    assert_same(expected, encode(chat_tokenizer))
    assert tokenised() == 2 * len(ROWS)
    assert path.read_bytes() == content


def test_runs_at_once_each_get_their_rows(
    chat_tokenizer: PreTrainedTokenizerFast, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Eight readers and writers of two entries; an entry that is replaced under a reader is whole."""
    sets = [ROWS, ROWS[::-1]]
    expected = [data.encode_rows(chat_tokenizer, rows, 64) for rows in sets]
    failed: list[BaseException] = []

    def run(which: int) -> None:
        try:
            for _ in range(5):
                for entry in folder.glob("*.safetensors"):
                    entry.unlink(missing_ok=True)
                assert_same(expected[which], encode(chat_tokenizer, sets[which]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert caplog.text == ""
    assert [path.name for path in folder.iterdir() if path.suffix != ".safetensors"] == []


def test_a_cache_that_cannot_be_written_costs_a_warning(
    chat_tokenizer: PreTrainedTokenizerFast, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_text("a file where the folder would be")
    assert len(encode(chat_tokenizer)) == len(ROWS)
    assert "not cached" in caplog.text


def test_a_user_without_a_home_is_told_what_to_set(
    chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)  # a container that runs under a number of its own
    assert len(encode(chat_tokenizer)) == len(ROWS)
    assert "not cached: there is no home folder; set XDG_CACHE_HOME" in caplog.text


def test_a_cache_that_may_only_be_read_is_used(
    chat_tokenizer: PreTrainedTokenizerFast,
    tokenised: Count,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encode(chat_tokenizer)

    def refuse(*_: object) -> None:  # permissions do not stop root, who may run this
        raise PermissionError

    monkeypatch.setattr("os.utime", refuse)
    encode(chat_tokenizer)
    assert (tokenised(), caplog.text) == (len(ROWS), "")


def test_the_oldest_entries_go(
    chat_tokenizer: PreTrainedTokenizerFast, folder: Path, monkeypatch: pytest.MonkeyPatch, tokenised: Count
) -> None:
    monkeypatch.setattr(token_cache, "KEEP", 2)
    for length in (60, 61, 60, 62):
        encode(chat_tokenizer, length=length)
    assert len(list(folder.iterdir())) == 2
    before = tokenised()
    encode(chat_tokenizer, length=60)
    assert tokenised() == before
    encode(chat_tokenizer, length=61)
    assert tokenised() == before + len(ROWS)
