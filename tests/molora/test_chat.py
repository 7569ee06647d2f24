from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from molora import chat
from molora.errors import UserError

ROW = {"prompt": "what is one", "response": "it is a plain answer"}


def trained_text(tokenizer: PreTrainedTokenizerFast, encoded: chat.Encoded) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != chat.IGNORE])


@pytest.mark.parametrize("name", ["chat_tokenizer", "plain_tokenizer"])
def test_a_training_row_is_the_generation_prompt_and_then_the_answer(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    prompt = chat.encode_prompt(tokenizer, [{"role": "user", "content": ROW["prompt"]}])
    encoded = chat.encode_row(tokenizer, ROW, 256)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[: len(prompt)] == [chat.IGNORE] * len(prompt)
    assert encoded.labels[len(prompt) :] == encoded.input_ids[len(prompt) :]
    assert not encoded.truncated


def test_chat_template_trains_the_answer_and_its_end_of_turn_only(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = chat.encode_row(chat_tokenizer, ROW, 256)
    assert trained_text(chat_tokenizer, encoded) == "it is a plain answer<|im_end|>"
    assert encoded.input_ids[-1] == chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "Be brief." in chat_tokenizer.decode(encoded.input_ids)


def test_plain_format_has_one_bos_and_ends_with_eos(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = chat.encode_row(plain_tokenizer, ROW, 256)
    assert plain_tokenizer.decode(encoded.input_ids) == (
        "<|begin|>User: what is one\n\nAssistant: it is a plain answer<|end|>"
    )
    assert trained_text(plain_tokenizer, encoded) == " it is a plain answer<|end|>"


def test_the_plain_template_can_be_saved_with_the_tokenizer(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    without = chat.encode_row(plain_tokenizer, ROW, 256)
    plain_tokenizer.chat_template = chat.template(plain_tokenizer)
    try:
        assert chat.encode_row(plain_tokenizer, ROW, 256) == without
    finally:
        plain_tokenizer.chat_template = None


@pytest.mark.parametrize("name", ["chat_tokenizer", "plain_tokenizer"])
def test_every_assistant_turn_is_trained(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    turns = [("system", "a few words"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns], "domain": "d"}
    encoded = chat.encode_row(tokenizer, row, 256)
    end = tokenizer.eos_token
    assert trained_text(tokenizer, encoded).replace(" ", "") == f"two{end}four{end}"
    assert encoded.domain == "d"
    assert "Be brief." not in tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize("name", ["chat_tokenizer", "plain_tokenizer"])
def test_a_truncated_row_has_no_end(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    whole = chat.encode_row(tokenizer, ROW, 256)
    exact = chat.encode_row(tokenizer, ROW, len(whole.input_ids))
    cut = chat.encode_row(tokenizer, ROW, len(whole.input_ids) - 1)
    assert exact == whole
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:-1]
    assert tokenizer.eos_token_id not in [label for label in cut.labels if label != chat.IGNORE]


def test_a_text_trains_everything_and_ends_with_one_eos(
    plain_tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    encoded = chat.encode_row(plain_tokenizer, {"text": "one two"}, 256)
    assert plain_tokenizer.decode(encoded.input_ids) == "<|begin|>one two<|end|>"
    assert encoded.labels == encoded.input_ids
    assert chat.encode_row(plain_tokenizer, {"text": "<|begin|>one two<|end|>"}, 256) == encoded
    assert chat_tokenizer.decode(chat.encode_row(chat_tokenizer, {"text": "one"}, 256).input_ids) == "one<|im_end|>"
    assert chat.encode_row(plain_tokenizer, {"text": "one two"}, 2).input_ids[-1] != plain_tokenizer.eos_token_id


def test_an_answer_that_merges_with_its_prompt_keeps_the_prompt_whole(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    # "\n" ends the prompt; "\n\n" is one token of this vocabulary, so tokenising the whole would straddle the seam.
    assert len(chat_tokenizer("\n\n", add_special_tokens=False).input_ids) == 1
    encoded = chat.encode_row(chat_tokenizer, {"prompt": "one", "response": "\ntwo"}, 256)
    prompt = chat.encode_prompt(chat_tokenizer, [{"role": "user", "content": "one"}])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert trained_text(chat_tokenizer, encoded) == "\ntwo<|im_end|>"


def test_rows_without_answer_have_nothing_to_train(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert not chat.encode_row(chat_tokenizer, {"messages": [{"role": "user", "content": "one"}]}, 256).trainable
    assert not chat.encode_row(chat_tokenizer, ROW, 5).trainable
    assert not chat.encode_row(chat_tokenizer, {"text": "o"}, 1).trainable


def test_stop_tokens(chat_tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert chat_tokenizer.decode(chat.stop_token_ids(chat_tokenizer)) == "<|im_end|>"
    assert plain_tokenizer.decode(chat.stop_token_ids(plain_tokenizer)) == "<|end|>"


def test_templates_that_cannot_be_trained_with_say_so(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    kept = chat_tokenizer.chat_template
    try:
        chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(UserError, match="roles must alternate"):
            chat.encode_row(chat_tokenizer, ROW, 256)
        chat_tokenizer.chat_template = "{{ messages | length }}{% if add_generation_prompt %}now:{% endif %}"
        with pytest.raises(UserError, match="differently"):
            chat.encode_row(chat_tokenizer, ROW, 256)
    finally:
        chat_tokenizer.chat_template = kept
