"""The one chat format: what training, evaluation and generation turn messages into.

A tokenizer that has a chat template is used with it. One that has none (base models, such as Llama-3.2-3B) gets
:data:`PLAIN_TEMPLATE`, which reads

    User: <question>

    Assistant: <answer><end of sequence>

with system text first, on its own. Prompts that :func:`encode_prompt` gives to generation are, token for token, the
beginnings of the rows that :func:`encode_row` gives to training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from molora.errors import UserError

IGNORE = -100
"""Label of a position without loss, as in :func:`torch.nn.functional.cross_entropy`."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# Llama 3's templates put today's date into every prompt unless they are given one: a run would depend on its day.
_TEMPLATE_VARIABLES: dict[str, Any] = {"date_string": "26 Jul 2024"}

Message = Mapping[str, str]


@dataclass(frozen=True)
class Encoded:
    """One row as tokens."""

    input_ids: list[int]
    labels: list[int]
    """As ``input_ids`` where the token is trained, else :data:`IGNORE`. Not shifted: label i is token i."""
    domain: str | None
    truncated: bool
    """The row was longer than allowed; then it does not end where the answer ended."""

    @property
    def trainable(self) -> bool:
        """Some token has a loss. The first position never has one: nothing predicts it."""
        return any(label != IGNORE for label in self.labels[1:])


def template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template to use where the tokenizer has none of its own, or None where it has one."""
    if tokenizer.chat_template is not None:
        return None
    return ("{{ bos_token }}" if _automatic_bos(tokenizer) else "") + PLAIN_TEMPLATE


def settle_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Leave the tokenizer with the one template that it is used with, so that it is saved with what was trained.

    Of several named ones that is ``default``; the others would be saved as files named as they please. Raises
    :class:`UserError` where there is none of that name.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        if "default" not in templates:
            raise UserError(
                f"the tokenizer has chat templates {sorted(templates)} and none named 'default'; "
                "leave one in its chat_template"
            )
        tokenizer.chat_template = templates["default"]
    else:
        tokenizer.chat_template = template(tokenizer) or templates


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next answer begins."""
    return _tokenize(tokenizer, _render(tokenizer, messages, generation_prompt=True))


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], max_length: int) -> Encoded:
    """Tokens and labels of a row with ``messages``, ``prompt`` and ``response``, or ``text``, in this order.

    In a conversation every assistant turn is trained, each with the token that ends it; in a text everything is, and
    an end-of-sequence token after it. What follows the last trained token is cut. Rows longer than ``max_length``
    tokens keep their first ``max_length``; no end-of-sequence token is put where the cut is.
    Raises :class:`UserError` when the row cannot be written in the chat format.
    """
    if "messages" in row:
        ids, labels = _encode_messages(tokenizer, row["messages"])
    elif "prompt" in row:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        ids, labels = _encode_messages(tokenizer, turns)
    else:
        ids, labels = _encode_text(tokenizer, row["text"])
    return Encoded(ids[:max_length], labels[:max_length], row.get("domain"), truncated=len(ids) > max_length)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the token that the chat format puts after one, and end-of-sequence."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    prompt = encode_prompt(tokenizer, messages[:1])
    answer = _continue(tokenizer, prompt, *_turn(tokenizer, messages, 1))[len(prompt) :]
    ends = [token for token in answer if token in _special_ids(tokenizer)][:1]
    return list(dict.fromkeys(ends + _eos(tokenizer)))


def _encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    special = _special_ids(tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, turn = _turn(tokenizer, messages, i)
        ids = _continue(tokenizer, ids, done, prompt)
        start = len(ids)
        ids = _continue(tokenizer, ids, prompt, turn)
        done = turn
        # Templates write more after the end-of-turn token (ChatML: a newline), which no answer should learn to say.
        end = next((j + 1 for j in reversed(range(start, len(ids))) if ids[j] in special), len(ids))
        labels += [IGNORE] * (start - len(labels)) + ids[start:end]
    return ids[: len(labels)], labels


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    ids = _tokenize(tokenizer, text)
    bos = _automatic_bos(tokenizer)
    if bos and ids[:1] != bos:
        ids = bos + ids
    eos = _eos(tokenizer)
    if ids[-1:] != eos:
        ids = ids + eos
    return ids, list(ids)


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], i: int) -> tuple[str, str]:
    """The conversation as text up to where answer ``i`` begins, and to where it ends; the first begins the second."""
    prompt = _render(tokenizer, messages[:i], generation_prompt=True)
    turn = _render(tokenizer, messages[: i + 1], generation_prompt=False)
    if not turn.startswith(prompt):
        raise UserError(
            "the tokenizer's chat template writes an answer differently after it was given than while it is asked "
            "for, so what to train cannot be told; use another template, or rows with 'text'"
        )
    return prompt, turn


def _continue(tokenizer: PreTrainedTokenizerBase, ids: list[int], done: str, text: str) -> list[int]:
    """Tokens of ``text`` that begin with exactly ``ids``, the tokens of its beginning ``done``.

    Tokenising the whole usually gives them. Where a token would straddle the seam (an answer that starts with the
    newline that the prompt ends with), the rest is tokenised alone, as generation would have to continue too.
    """
    whole = _tokenize(tokenizer, text)
    if whole[: len(ids)] == ids:
        return whole
    if not text.startswith(done):
        raise UserError(
            "the tokenizer's chat template rewrites earlier turns when a later one is added; "
            "split the conversation into rows with one answer each"
        )
    return ids + _tokenize(tokenizer, text[len(done) :])


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template(tokenizer),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **_TEMPLATE_VARIABLES,
        )
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses this conversation: {error}") from error
    assert isinstance(rendered, str)
    return rendered


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # A rendered template carries its own special tokens; adding them here would double the first.
    return tokenizer(text, add_special_tokens=False).input_ids


@lru_cache(maxsize=4)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    # An end-of-turn token may be an added token that carries no role, which `all_special_ids` then leaves out.
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def _eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos: Any = tokenizer.eos_token_id
    return [] if eos is None else [eos]


def _automatic_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``[bos]`` if the tokenizer puts it before every text by itself, which is how its model was trained; else []."""
    bos: Any = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
