"""How good a model is on held-out rows: loss and perplexity of the answers, and exact match where rows have one.

    python -m molora.evaluate --model base --model outputs/quickstart/stage2/final \\
        --bench data/quickstart/general.bench.jsonl --bench data/quickstart/maths.bench.jsonl

Shape letters: B rows, T tokens per row (padded), N positions with a loss, H hidden size, V vocabulary, R routers,
E experts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molora import chat, cli, provenance, routing
from molora.adapter import is_adapter, load, read_manifest
from molora.answers import check_gold, is_correct
from molora.config import Config
from molora.config import Data as DataConfig
from molora.data import Batch, Collate, Example, Row, read_rows
from molora.errors import UserError
from molora.files import write_text
from molora.generate import Answer, decode, generate_tokens, prefix_cache
from molora.loss import CHUNK_ELEMENTS
from molora.scores import BenchResult, Score, groups_of, table

# --- measuring ---------------------------------------------------------------------------------------------------


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    max_length: int = 4096,
    loss_rows: int | None = None,
    title: str = "",
) -> BenchResult:
    """Loss of the answers of all rows, and exact match of greedy generation for rows with a text ``answer``.

    Args:
        rows: as :func:`molora.data.read_rows` gives them.
        max_new_tokens: room for a generated answer. One that needs more is cut and judged as it stands.
        batch_size: rows at a time. Results depend on it only as far as rounding does.
        max_length: tokens of a row that count for the loss; what comes after is left out.
        loss_rows: measure the loss on so many rows of each finest group, the first ones; None: on all.
        title: what the progress bars say in front.

    Raises:
        UserError: no row has anything to measure, or an ``answer`` cannot be read.
    """
    for row in rows:
        if isinstance(row.get("answer"), str):
            check_gold(row["answer"], row.get("where", ""))
    was_training = model.training
    model.eval()
    try:
        scores, read = _measure_loss(model, tokenizer, rows, loss_rows, batch_size, max_length, title)
        scores, written = _measure_exact_match(model, tokenizer, rows, scores, batch_size, max_new_tokens, title)
    finally:
        model.train(was_training)
    if read is None and written is None:
        raise UserError(f"none of {len(rows)} rows has an answer to measure; add answers or raise max_length")
    return BenchResult(tuple(scores), read, written)


def answer_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(B,) fp32: each row's sum of next-token losses over its labels. No graph.

    The rows of :func:`molora.loss.causal_lm_loss`, which sums over the batch and is made for training.
    """
    head = model.get_output_embeddings()
    assert head is not None
    losses = []
    with torch.no_grad():
        # What all rows begin with is read once, unless something in it predicts a label.
        length = batch.input_ids.shape[1]
        rows, columns = batch.predictors // length, batch.predictors % length
        alike = (batch.input_ids == batch.input_ids[0]).all(dim=0).cumprod(dim=0).sum()
        shared = int(torch.minimum(alike, columns.min()))
        cache = prefix_cache(model, batch.input_ids[0, :shared], len(batch.domains)) if shared else None
        hidden: Tensor = model.base_model(
            input_ids=batch.input_ids[:, shared:],
            attention_mask=batch.attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        predicting = hidden[rows, columns - shared]
        targets = batch.labels.flatten().index_select(0, batch.predictors + 1)
        # A chunk at a time, because the logits (N, V) of a large vocabulary would be the largest tensor by far.
        chunk = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
        for part, target in zip(predicting.split(chunk), targets.split(chunk), strict=True):
            losses.append(F.cross_entropy(head(part).float(), target, reduction="none"))
        return torch.zeros(len(batch.domains), device=hidden.device).index_add_(0, rows, torch.cat(losses))


@torch.no_grad()
def routing_counts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int = 32
) -> Tensor:
    """(R, E) fp32 on the CPU: how many tokens of the rows' answers chose each expert, for each router of the model.

    Prompts are left out: the chat template's words, the same in every row, would hide how domains differ. Raises
    ValueError for a model without routers.
    """
    examples = [_example(encoded) for encoded in _encode(tokenizer, rows, max_length=4096)]
    examples.sort(key=lambda example: len(example.input_ids), reverse=True)
    collate, total = Collate(tokenizer), None
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size]).to(model.device)
        record = routing.record(model, batch.labels != chat.IGNORE)
        with routing.using(model, record):
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        total = record.counts if total is None else total + record.counts
    if total is None:
        raise ValueError("no rows, so no routing")
    return total.cpu()


def _measure_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    limit: int | None,
    batch_size: int,
    max_length: int,
    title: str,
) -> tuple[list[Score], float | None]:
    """Scores with the loss, in the order of ``rows``, and tokens read per second."""
    scores = [Score(groups_of(row)) for row in rows]
    examples: dict[int, Example] = {}
    measured = Counter[str]()
    for i, encoded in enumerate(_encode(tokenizer, rows, max_length)):
        finest = scores[i].groups[-1]
        if encoded.trainable and (limit is None or measured[finest] < limit):
            examples[i] = _example(encoded)
            measured[finest] += 1
    if not examples:
        return scores, None
    collate = Collate(tokenizer)
    order = sorted(examples, key=lambda i: len(examples[i].input_ids), reverse=True)
    tokens, started = 0, time.perf_counter()
    with tqdm(total=len(order), desc=f"{title} loss".strip(), unit="row", disable=None, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([examples[i] for i in chosen])
            losses = answer_losses(model, batch.to(model.device)).tolist()
            for i, loss in zip(chosen, losses, strict=True):
                counted = int((examples[i].labels[1:] != chat.IGNORE).sum())
                scores[i] = replace(scores[i], loss=loss, tokens=counted)
            tokens += batch.tokens
            bar.update(len(chosen))
    return scores, tokens / (time.perf_counter() - started)


def _measure_exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    scores: Sequence[Score],
    batch_size: int,
    max_new_tokens: int,
    title: str,
) -> tuple[list[Score], float | None]:
    """``scores`` with prediction and verdict where a row has an answer, and tokens written per second."""
    scores = list(scores)
    asked = [i for i, row in enumerate(rows) if isinstance(row.get("answer"), str) and "text" not in row]
    if not asked:
        return scores, None
    prompts = [chat.encode_prompt(tokenizer, _question(rows[i])) for i in asked]
    started = time.perf_counter()
    with tqdm(total=len(asked), desc=f"{title} answers".strip(), unit="row", disable=None, leave=False) as bar:
        answers: list[Answer] = generate_tokens(model, tokenizer, prompts, max_new_tokens, batch_size, bar.update)
    seconds = time.perf_counter() - started
    for i, answer in zip(asked, answers, strict=True):
        prediction = decode(tokenizer, answer.tokens)
        correct = is_correct(rows[i]["answer"], prediction)
        scores[i] = replace(scores[i], prediction=prediction, correct=correct)
    return scores, sum(answer.generated for answer in answers) / seconds


def _encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int) -> Iterator[chat.Encoded]:
    for row in rows:
        try:
            yield chat.encode_row(tokenizer, row, max_length)
        except UserError as error:
            raise UserError(f"{row.get('where', 'a row')}: {error}") from error


def _example(encoded: chat.Encoded) -> Example:
    return Example(torch.tensor(encoded.input_ids), torch.tensor(encoded.labels), encoded.domain or "")


def _question(row: Row) -> list[chat.Message]:
    """The conversation up to the answer that the bench wants: without its last assistant message."""
    if "messages" not in row:
        return [{"role": "user", "content": row["prompt"]}]
    messages = list(row["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


# --- command line ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` default to the process's own. Raises :class:`UserError` for bad input."""
    options = _parse(arguments)
    for name in ("max_new_tokens", "batch_size", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    benches = {path: read_rows(path)[: options.limit] for path in options.bench}
    models = {name: _resolve(name, options.model) for name in options.model}
    results: list[tuple[str, str, BenchResult]] = []
    for name, folder in models.items():
        model, tokenizer = load(folder, device=options.device)
        for path, rows in benches.items():
            result = evaluate(
                model,
                tokenizer,
                rows,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                title=f"{name} {Path(path).name}",
            )
            results.append((name, path, result))
            if options.output:  # after each, so that an interruption loses one part and not all
                _write(options, results)
    Console().print(table(results))
    if options.output:
        print(f"written: {options.output}")


def _resolve(name: str, names: Sequence[str]) -> str:
    """The folder or hub name that ``--model name`` means: ``base`` is the base model of the first adapter folder."""
    if name != "base" or Path(name).exists():
        return name
    adapters = [Path(other) for other in names if is_adapter(Path(other))]
    if not adapters:
        raise UserError("--model base: the base of what? give an adapter folder as another --model, or name the base")
    return str(read_manifest(adapters[0])["base_model"])


def _write(options: argparse.Namespace, results: Sequence[tuple[str, str, BenchResult]]) -> None:
    tree = {
        "provenance": provenance.collect(Config(data=DataConfig(path=options.bench))),
        "settings": {name: getattr(options, name) for name in ("max_new_tokens", "batch_size", "limit")},
        "results": [{"model": model, "bench": bench} | result.to_json() for model, bench, result in results],
    }
    write_text(options.output, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m molora.evaluate", description="Measure models on held-out rows.")
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="base|HUB|DIR",
        help="hub name, model folder or a stage's final/ folder; base: the base model of that stage; repeatable",
    )
    parser.add_argument("--bench", action="append", required=True, metavar="FILE", help="JSONL rows; repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each bench")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="results, and every row's prediction")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run(main)
