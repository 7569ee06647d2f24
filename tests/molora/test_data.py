from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from molora import chat, data
from molora.errors import UserError
from tests.conftest import make_rows, write_jsonl


def read(tmp_path: Path, content: bytes) -> list[data.Row]:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    return data.read_rows(path)


def test_rows_keep_their_columns_and_learn_domain_and_place(tmp_path: Path) -> None:
    rows = read(tmp_path, b'\xef\xbb\xbf{"text": "a", "task": 1}\n\n{"text": "b", "domain": "d"}')
    assert rows == [
        {"text": "a", "task": 1, "domain": "x", "where": f"{tmp_path}/x.jsonl:1"},
        {"text": "b", "domain": "d", "where": f"{tmp_path}/x.jsonl:3"},
    ]


def test_several_files_in_order(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", make_rows(2, seed)) for seed, name in enumerate("ab")]
    assert [row["domain"] for row in data.read_rows(paths)] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"\n\n", "no rows"),
        (b'{"text": "a"}\n{"text": ', r"x\.jsonl:2: not JSON"),
        (b'{"text": "\xff"}', r"x\.jsonl:1: not UTF-8"),
        (b"[" * 100_000, r"x\.jsonl:1: not JSON"),
        (b"9" * 5000, r"x\.jsonl:1: not JSON"),
        (b"3", r"x\.jsonl:1: a int"),
        (b'{"question": "a"}', r"x\.jsonl:1: no known columns \(found 'question'\)"),
        (b'{"prompt": "a"}', "no known columns"),
        (b'{"text": 3}', "'text' is a int"),
        (b'{"text": "a", "domain": 1}', "'domain' is a int"),
        (b'{"prompt": "a", "response": null}', "'response' is a NoneType"),
        (b'{"text": "\\ud83d"}', "surrogate"),
        (b'{"messages": []}', "'messages' must be a list"),
        (b'{"messages": [{"role": "user"}]}', "a message must be"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "role 'tool'"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "assistant speaks first"),
    ],
)
def test_bad_files_are_named_with_line_and_reason(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; name a JSONL file"):
        data.read_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        data.read_rows(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["text", "messages", "role", "content", "prompt"]), inner, max_size=3)
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_whatever_the_file_holds_it_is_read_or_explained(tmp_path: Path, content: bytes) -> None:
    try:
        rows = read(tmp_path, content)
    except UserError:
        return
    assert rows


def test_held_out_rows_are_disjoint_and_depend_on_the_seed() -> None:
    rows = [{"text": str(i)} for i in range(20)]
    train, held_out = data.hold_out(rows, 5, seed=1)
    assert len(held_out) == 5
    assert sorted(row["text"] for row in train + held_out) == sorted(row["text"] for row in rows)
    assert data.hold_out(rows, 5, seed=1)[1] == held_out != data.hold_out(rows, 5, seed=2)[1]
    with pytest.raises(UserError, match="val_size=20"):
        data.hold_out(rows, 20, seed=1)


def test_rows_without_trainable_token_are_dropped_and_counted(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    long = {"prompt": "one", "response": "two " * 99, "where": "-"}
    silent = {"messages": [{"role": "user", "content": "one"}], "where": "-"}
    examples = data.encode_rows(chat_tokenizer, [{"prompt": "one", "response": "two", "where": "-"}, long, silent], 64)
    assert (len(examples), examples.truncated, examples.dropped) == (2, 1, 1)
    with pytest.raises(UserError, match="none of 1 rows has a token to train"):
        data.encode_rows(chat_tokenizer, [silent], 64)
    with pytest.raises(UserError, match=r"all of 1 rows are longer than data\.max_length=64"):
        data.encode_rows(chat_tokenizer, [long], 64)


def test_collate_pads_right_and_finds_what_predicts_a_label(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        data.Example(torch.tensor([5, 6, 7]), torch.tensor([chat.IGNORE, 6, 7]), "a"),
        data.Example(torch.tensor([8, 9]), torch.tensor([8, 9]), "b"),
    ]
    batch = data.Collate(chat_tokenizer)(rows)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, chat_tokenizer.eos_token_id]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7], [8, 9, -100]]
    # The label at a row's first position has no predictor; in particular not the end of the row before.
    assert batch.predictors.tolist() == [0, 1, 3]
    assert (batch.label_tokens, batch.tokens, batch.domains) == (3, 5, ["a", "b"])


@given(rows=st.integers(1, 9), seed=st.integers(0, 3), start=st.integers(0, 40), length=st.integers(0, 40))
def test_the_order_continues_from_any_position(rows: int, seed: int, start: int, length: int) -> None:
    whole = list(data.RunOrder(rows, seed, 0, start + length))
    assert whole[start:] == list(data.RunOrder(rows, seed, start, start + length))
    for epoch in range(len(whole) // rows):
        assert sorted(whole[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_and_seeds_have_different_orders() -> None:
    order = list(data.RunOrder(50, 0, 0, 100))
    assert order[:50] != order[50:]
    assert order != list(data.RunOrder(50, 1, 0, 100))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(
    chat_tokenizer: PreTrainedTokenizerFast, num_workers: int
) -> None:
    examples = data.encode_rows(chat_tokenizer, [row | {"where": "-"} for row in make_rows(10)], 64)
    before = torch.get_rng_state()
    order = data.RunOrder(10, 0, 0, 14)
    loader = data.batches(examples, data.Collate(chat_tokenizer), batch_size=3, order=order, num_workers=num_workers)
    windows = list(data.windows(loader, 2))
    assert [[len(batch.domains) for batch in window] for window in windows] == [[3, 3], [3, 3], [2]]
    assert torch.equal(torch.get_rng_state(), before)
