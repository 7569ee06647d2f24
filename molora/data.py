"""Rows from JSONL files, as tokens, in an order that depends on nothing but the seed and the position in the run.

Shape letters: B rows, T tokens per row (padded), N positions with a loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from molora import chat, token_cache
from molora.errors import UserError

Row = dict[str, Any]
_COLUMNS = '{"messages": […]}, {"prompt": …, "response": …} or {"text": …}'


# --- reading -----------------------------------------------------------------------------------------------------


def read_rows(path: str | Path | Sequence[str | Path]) -> list[Row]:
    """All rows of one or several JSONL files, each checked, in file order.

    A row keeps its columns and gets two: ``domain``, the file's name without its ending where the row names none, and
    ``where``, ``file:line`` for messages. Raises :class:`UserError` (``file:line: reason; mend``) at the first bad row.
    """
    paths = [path] if isinstance(path, str | Path) else path
    rows = [row for one in paths for row in _read_file(Path(one))]
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))}: no rows; write one JSON object a line, {_COLUMNS}")
    return rows


def _read_file(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield {"domain": path.stem} | _check_row(_parse(line, where), where) | {"where": where}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a JSONL file that is there") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: not JSON that can be read ({error}); write one object a line") from None


def _check_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object; write {_COLUMNS}")
    if "messages" in row:
        _check_messages(row["messages"], where)
        columns = ()
    elif "prompt" in row and "response" in row:
        columns = ("prompt", "response")
    elif "text" in row:
        columns = ("text",)
    else:
        found = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{where}: no known columns (found {found}); write {_COLUMNS}")
    for column in (*columns, *({"domain"} & row.keys())):
        if not isinstance(row[column], str):
            raise UserError(f"{where}: {column!r} is a {type(row[column]).__name__}; it must be a string")
        _check_characters(row[column], where)
    return row


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of at least one message")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f'{where}: a message must be {{"role": …, "content": …}} with two strings')
        if message["role"] not in ("system", "user", "assistant"):
            raise UserError(f"{where}: role {message['role']!r} is unknown; use system, user or assistant")
        _check_characters(message["content"], where)
    if next((m["role"] for m in messages if m["role"] != "system"), "user") != "user":
        raise UserError(f"{where}: the assistant speaks first; after an optional system message comes the user")


def _check_characters(text: str, where: str) -> None:
    # JSON can spell half of a surrogate pair (an emoji cut in two), which is no character and cannot be tokenised.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: half of a surrogate pair (\\ud800 to \\udfff); remove it or mend the emoji"
        ) from None


def spread(rows: Sequence[Row], count: int) -> Sequence[Row]:
    """``count`` rows at even distances, so that every part of a sorted file is among them; all if there are fewer."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows


def hold_out(rows: Sequence[Row], size: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and ``size`` rows to evaluate on, drawn with ``seed``; both keep the file's order."""
    if size >= len(rows):
        raise UserError(f"training.val_size={size} leaves nothing of {len(rows)} rows to train on; lower it")
    held = set(np.random.default_rng(seed).permutation(len(rows))[:size].tolist())
    train = [row for i, row in enumerate(rows) if i not in held]
    return train, [rows[i] for i in sorted(held)]


# --- tokens ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A tokenised row, or several packed into one (:mod:`molora.packing`); int32, because a run may hold a hundred
    million tokens."""

    input_ids: Tensor
    labels: Tensor
    domain: str
    where: str = ""
    """``file:line``"""
    lengths: tuple[int, ...] = ()
    """Tokens of each row that is packed into this one; empty for a single row."""
    packed_domains: tuple[str, ...] = ()
    """The domain of each of them."""


@dataclass(frozen=True)
class Examples:
    """Tokenised rows that have something to learn."""

    rows: list[Example]
    truncated: int
    """How many of them lost their end to ``max_length``."""
    dropped: int
    """Rows left out: no token of theirs has a loss (no answer, or an answer that begins after ``max_length``)."""

    def __len__(self) -> int:
        return len(self.rows)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    *,
    cache: bool = False,
    held_out: bool = False,
    key: str = "data.max_length",
) -> Examples:
    """Tokenise rows, or take their tokens from the cache (:mod:`molora.token_cache`).

    Raises :class:`UserError` if none has a trainable token or, unless they are ``held_out``, none fits into
    ``max_length``, which ``key`` names to the user.
    """

    def encode() -> token_cache.Tensors:
        return _joined([_encode(tokenizer, row, max_length) for row in rows])

    tokens = token_cache.through(tokenizer, rows, max_length, encode) if cache else encode()
    lengths = tokens["lengths"].tolist()
    columns = zip(
        rows,
        tokens["input_ids"].split(lengths),
        tokens["labels"].split(lengths),
        tokens["truncated"].tolist(),
        lengths,
        strict=True,
    )
    examples: list[Example] = []
    truncated = 0
    for row, input_ids, labels, cut, length in columns:
        if length:
            examples.append(Example(input_ids, labels, row.get("domain", ""), row.get("where", "")))
            truncated += cut
    dropped = len(rows) - len(examples)
    if not examples:
        raise UserError(
            f"none of {len(rows)} rows has a token to train within {key}={max_length}: "
            f"their answers are missing or begin later; raise {key} or add answers"
        )
    if truncated == len(examples) and not held_out:
        raise UserError(
            f"all of {len(rows)} rows are longer than {key}={max_length}, so no end of an answer "
            f"would ever be learnt; raise {key}"
        )
    return Examples(examples, truncated, dropped)


def _joined(encoded: list[chat.Encoded]) -> token_cache.Tensors:
    """Rows end to end, with their lengths; one that has nothing to train has length 0."""
    kept = [row if row.trainable else None for row in encoded]

    def end_to_end(lists: Iterable[list[int]]) -> Tensor:
        return torch.tensor([token for tokens in lists for token in tokens], dtype=torch.int32)

    return {
        "input_ids": end_to_end(row.input_ids for row in kept if row),
        "labels": end_to_end(row.labels for row in kept if row),
        "lengths": torch.tensor([len(row.input_ids) if row else 0 for row in kept]),
        "truncated": torch.tensor([row.truncated if row else False for row in kept]),
    }


def _encode(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], max_length: int) -> chat.Encoded:
    try:
        return chat.encode_row(tokenizer, row, max_length)
    except UserError as error:
        raise UserError(f"{row['where']}: {error}") from error


# --- batches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows padded at the right to the longest of them."""

    input_ids: Tensor
    """(B, T) int64"""
    attention_mask: Tensor
    """(B, T) int64, 1 for a token and 0 for padding"""
    labels: Tensor
    """(B, T) int64, not shifted; -100 without loss"""
    predictors: Tensor
    """(N,) int64: where, in the flattened (B * T), a hidden state predicts a label; the label is the next position's.
    Counted on the CPU, so that choosing them on the GPU waits for nothing."""
    tokens: int
    """Tokens that are not padding."""
    domains: list[str]
    where: list[str]
    """``file:line`` of each row."""
    position_ids: Tensor | None = None
    """(B, T) int64 if rows are packed: each counts from 0, and so does the padding, so that all are kept apart."""
    spans: list[list[tuple[str, int]]] = field(default_factory=list)
    """For each row the domain and the number of its tokens; a packed one has a span for each row in it."""

    @property
    def label_tokens(self) -> int:
        """N, the number of tokens with a loss."""
        return self.predictors.numel()

    def to(self, device: torch.device | str) -> Batch:
        """This batch on ``device``; the copy does not block when the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """This batch in page-locked memory; called by the DataLoader."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Any) -> Batch:
        names = ("input_ids", "attention_mask", "labels", "predictors")
        positions = None if self.position_ids is None else change(self.position_ids)
        return replace(self, position_ids=positions, **{name: change(getattr(self, name)) for name in names})


class Collate:
    """Pads examples into a :class:`Batch`; an object, so that worker processes can be handed it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # The attention mask hides padding; the id only has to be in the vocabulary.
        ids: list[Any] = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
        self.pad_id: int = next(i for i in ids if i is not None)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        shape = (len(examples), max(len(example.input_ids) for example in examples))
        input_ids = torch.full(shape, self.pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, chat.IGNORE)
        for i, example in enumerate(examples):
            length = len(example.input_ids)
            input_ids[i, :length] = example.input_ids
            attention_mask[i, :length] = 1
            labels[i, :length] = example.labels
        followed = torch.zeros(shape, dtype=torch.bool)
        followed[:, :-1] = labels[:, 1:] != chat.IGNORE
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            predictors=followed.flatten().nonzero().flatten(),
            tokens=sum(len(example.input_ids) for example in examples),
            domains=[example.domain for example in examples],
            where=[example.where for example in examples],
            spans=[spans(example) for example in examples],
            position_ids=_positions(examples, shape[1]) if any(example.lengths for example in examples) else None,
        )


def spans(example: Example) -> list[tuple[str, int]]:
    """The domain and the number of tokens of each row in an example."""
    if not example.lengths:
        return [(example.domain, len(example.input_ids))]
    return list(zip(example.packed_domains, example.lengths, strict=True))


def _positions(examples: Sequence[Example], length: int) -> Tensor:
    """(B, length): every packed row counts from 0, and what is left at the end does too."""
    rows = []
    for example in examples:
        lengths = example.lengths or (len(example.input_ids),)
        rows.append(torch.cat([torch.arange(n) for n in (*lengths, length - sum(lengths))]))
    return torch.stack(rows)


class RunOrder(Sampler[int]):
    """Rows ``start`` to ``stop`` of an endless run over ``rows`` rows: one permutation after another, one per epoch.

    The position alone says where in the data a run is, so a resumed run needs no other state of the order. Of several
    ``processes`` each takes every so-many-th, beginning at its ``rank``: together they take each once.
    """

    def __init__(self, rows: int, seed: int, start: int, stop: int, rank: int = 0, processes: int = 1) -> None:
        self.rows, self.seed, self.start, self.stop = rows, seed, start, stop
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return len(range(self.start + self.rank, self.stop, self.processes))

    def __iter__(self) -> Iterator[int]:
        return islice(self._all(), self.rank, None, self.processes)

    def _all(self) -> Iterator[int]:
        epoch, offset = divmod(self.start, self.rows)
        remaining = self.stop - self.start
        while remaining > 0:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)[offset : offset + remaining]
            yield from order.tolist()
            remaining -= len(order)
            epoch, offset = epoch + 1, 0


def batches(
    examples: Examples,
    collate: Collate,
    *,
    batch_size: int,
    order: Sampler[int] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """A loader of :class:`Batch` in ``order``, or in file order; it leaves the global random state alone."""
    return DataLoader(
        examples.rows,  # pyright: ignore[reportArgumentType]  # a list is a map-style data set
        batch_size=batch_size,
        sampler=order,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Without its own generator every new iterator would draw a seed from the global one, and so would a resume.
        generator=torch.Generator(),
    )


def windows(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The micro-batches of one optimizer step after another, ``size`` at a time."""
    iterator = iter(loader)
    while window := list(islice(iterator, size)):
        yield window
