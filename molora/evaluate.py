"""How good a model is on held-out rows: loss and perplexity of the answers, and exact match where rows have one.

    python -m molora.evaluate --model base --model outputs/quickstart/stage2/final \\
        --bench data/quickstart/general.bench.jsonl --bench data/quickstart/maths.bench.jsonl

What is measured is kept row by row in ``outputs/evaluate/``, keyed by the model's and the bench's bytes and the
settings: a killed run goes on where it was, and nothing is measured twice. pass@1 is exact match of one greedy answer,
judged by math-verify.

Shape letters: B rows, T tokens per row (padded), N positions with a loss, H hidden size, V vocabulary, R routers,
E experts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import molora
from molora import chat, cli, harness, provenance, routing
from molora.adapter import describe_base, find_adapter, load, locate_base, pick_device, pick_dtype, read_manifest
from molora.answers import check_gold, is_correct
from molora.config import Config, LoadPrecision, check
from molora.config import Data as DataConfig
from molora.data import Batch, Collate, Example, Row, read_rows
from molora.errors import UserError
from molora.files import check_target, file_sha256, write_text
from molora.folders import short_names
from molora.generate import Answer, decode, generate_tokens, prefix_cache
from molora.journal import Journal, digest
from molora.loss import CHUNK_ELEMENTS, after_head, check_head
from molora.scores import METHOD, BenchResult, Results, Score, comparison, differences, groups_of

LOSS, ANSWERS = "loss", "answers"
"""The parts of a measurement, as its journal names them."""
MEASUREMENT = 3
"""Raised with every change that changes what is measured, so that what was kept before is measured again."""

# --- measuring ---------------------------------------------------------------------------------------------------


class Opened:
    """A model and its tokenizer, loaded when first asked for: not at all where everything was measured before."""

    def __init__(self, name: str | Path, device: str = "auto", precision: str = "auto") -> None:
        self.name, self.device, self.precision = str(name), device, precision

    @cached_property
    def _pair(self) -> tuple[PreTrainedModel, Any]:
        model, tokenizer = load(self.name, self.device, self.precision)
        check_head(model)
        return model, tokenizer

    @property
    def model(self) -> PreTrainedModel:
        return self._pair[0]

    @property
    def tokenizer(self) -> Any:
        return self._pair[1]


def fingerprint(name: str | Path) -> dict[str, Any]:
    """What decides what a model reads and says: SHA-256 of the files in its folder, or the commit of a hub model; for
    an adapter those of its base, too. Raises :class:`UserError` for a model that is not there.
    """
    adapter = find_adapter(name)
    folder = adapter or Path(name)
    if not folder.is_dir():
        base, _ = describe_base(Config(model_name=str(name)))
        return {"hub": str(name), "commit": getattr(base, "_commit_hash", None)}
    # More files than most tokenizers have, and some that decide nothing: one too many costs a measurement, one too few
    # a wrong number.
    names = ("safetensors", "json", "jinja", "model", "txt", "tiktoken", "py")
    patterns = (*(f"*.{name}" for name in names), "additional_chat_templates/*.jinja")
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    found: dict[str, Any] = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    if adapter is not None:
        found["base"] = fingerprint(locate_base(adapter, read_manifest(adapter)))
    return found


def evaluate_kept(
    opened: Opened, bench: str | Path, folder: Path, *, limit: int | None = None, title: str = "", **settings: Any
) -> BenchResult:
    """:func:`evaluate` on the first ``limit`` rows of the file ``bench``, with what was measured before taken from
    ``folder``. ``settings`` are those of :func:`evaluate`. Raises :class:`UserError` as it does."""
    bench = Path(bench)
    rows = read_rows(bench)[:limit]
    key = _measuring(opened) | {"bench": file_sha256(bench), "settings": settings}
    journal = Journal(key, folder / f"{bench.stem}-{digest(key)}.jsonl")
    if not journal.finished(len(rows)):
        journal.begin()
        evaluate(opened.model, opened.tokenizer, rows, title=title, journal=journal, **settings)
        journal.finish(len(rows))
    return _result(rows, journal)


def _measuring(opened: Opened) -> dict[str, Any]:
    """What decides a measurement beside what is asked: the model, and what computes it."""
    device, precision = pick_device(opened.device), check(LoadPrecision, {"mode": opened.precision})
    return {
        "model": fingerprint(opened.name),
        "dtype": str(pick_dtype(precision, device)) if precision.bits() is None else repr(precision),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": [module.__version__ for module in (molora, torch, transformers, tokenizers)],
        "measurement": MEASUREMENT,
    }


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
    journal: Journal | None = None,
) -> BenchResult:
    """Loss of the answers of all rows, and exact match of greedy generation for rows with an ``answer``.

    Args:
        rows: as :func:`molora.data.read_rows` gives them.
        max_new_tokens: room for a generated answer. One that needs more is cut and judged as it stands.
        batch_size: rows at a time. Results depend on it only as far as rounding does.
        max_length: tokens of a row that count for the loss; what comes after is left out.
        loss_rows: measure the loss on so many rows of each finest group, the first ones; None: on all.
        title: what the progress bars say in front.
        journal: takes every batch as it is measured; rows that it has already are not measured again.

    Raises:
        UserError: no row has anything to measure, or an ``answer`` cannot be read.
    """
    _check_golds(rows)
    journal = journal or Journal({})
    was_training = model.training
    model.eval()
    try:
        _measure_loss(model, tokenizer, rows, journal, loss_rows, batch_size, max_length, title)
        _measure_exact_match(model, tokenizer, rows, journal, batch_size, max_new_tokens, title)
    finally:
        model.train(was_training)
    if not journal.rows(LOSS) and not journal.rows(ANSWERS):
        place = f"{rows[0]['where'].rpartition(':')[0]}: " if rows and "where" in rows[0] else ""
        raise UserError(f"{place}none of {len(rows)} rows has an answer to measure; add answers or raise max_length")
    return _result(rows, journal)


def _result(rows: Sequence[Row], journal: Journal) -> BenchResult:
    scores = [Score(groups_of(row)) for row in rows]
    for i, score in enumerate(scores):
        if i in journal.rows(LOSS):
            loss, tokens = journal.rows(LOSS)[i]
            score = replace(score, loss=loss, tokens=tokens)
        if i in journal.rows(ANSWERS):
            prediction, correct = journal.rows(ANSWERS)[i]
            score = replace(score, prediction=prediction, correct=correct)
        scores[i] = score
    return BenchResult(tuple(scores), journal.speed(LOSS), journal.speed(ANSWERS), journal.seconds)


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
        chunk = max(1, CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
        factor, softcap = after_head(model)
        for part, target in zip(predicting.split(chunk), targets.split(chunk), strict=True):
            logits = head(part).float()
            if factor != 1:
                logits.mul_(factor)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
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
    journal: Journal,
    limit: int | None,
    batch_size: int,
    max_length: int,
    title: str,
) -> None:
    examples: dict[int, Example] = {}
    measured = Counter[str]()
    for i, (row, encoded) in enumerate(zip(rows, _encode(tokenizer, rows, max_length), strict=True)):
        finest = groups_of(row)[-1]
        if encoded.trainable and (limit is None or measured[finest] < limit):
            examples[i] = _example(encoded)
            measured[finest] += 1
    collate = Collate(tokenizer)
    order = sorted(examples, key=lambda i: len(examples[i].input_ids), reverse=True)
    for chosen in _left(order, journal, LOSS, batch_size, f"{title} loss"):
        started = time.perf_counter()
        batch = collate([examples[i] for i in chosen])
        losses = answer_losses(model, batch.to(model.device)).tolist()
        counted = [int((examples[i].labels[1:] != chat.IGNORE).sum()) for i in chosen]
        found = {i: [loss, tokens] for i, loss, tokens in zip(chosen, losses, counted, strict=True)}
        journal.add(LOSS, found, batch.tokens, time.perf_counter() - started)


def _measure_exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    journal: Journal,
    batch_size: int,
    max_new_tokens: int,
    title: str,
) -> None:
    golds = {i: gold for i, row in enumerate(rows) if (gold := _gold(row)) is not None and "text" not in row}
    prompts = {i: chat.encode_prompt(tokenizer, _question(rows[i])) for i in golds}
    # Those of about the same length together; the longest first, so that a lack of memory shows at once.
    order = sorted(golds, key=lambda i: len(prompts[i]), reverse=True)
    for chosen in _left(order, journal, ANSWERS, batch_size, f"{title} answers"):
        started = time.perf_counter()
        asking = [prompts[i] for i in chosen]
        answers: list[Answer] = generate_tokens(model, tokenizer, asking, max_new_tokens, batch_size)
        seconds = time.perf_counter() - started
        texts = [decode(tokenizer, answer.tokens) for answer in answers]
        found = {i: [text, is_correct(golds[i], text)] for i, text in zip(chosen, texts, strict=True)}
        journal.add(ANSWERS, found, sum(answer.generated for answer in answers), seconds)


def _left(order: Sequence[int], journal: Journal, part: str, batch_size: int, title: str) -> Iterator[Sequence[int]]:
    """Batches of the rows that the journal has not, in the order given, under a progress bar."""
    left = [i for i in order if i not in journal.rows(part)]
    done = len(order) - len(left)
    with tqdm(total=len(order), initial=done, desc=title.strip(), unit="row", disable=None, leave=False) as bar:
        for start in range(0, len(left), batch_size):
            yield (chosen := left[start : start + batch_size])
            bar.update(len(chosen))


def _encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int) -> Iterator[chat.Encoded]:
    for row in rows:
        try:
            yield chat.encode_row(tokenizer, row, max_length)
        except UserError as error:
            raise UserError(f"{row.get('where', 'a row')}: {error}") from error


def _example(encoded: chat.Encoded) -> Example:
    return Example(torch.tensor(encoded.input_ids), torch.tensor(encoded.labels), encoded.domain or "")


def _gold(row: Row) -> str | None:
    """The answer that exact match compares with; None for a row without one. A number is what it looks like."""
    answer = row.get("answer")
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"{row.get('where', 'a row')}: 'answer' is a {type(answer).__name__}; write a number or LaTeX")
    return str(answer)


def _check_golds(rows: Sequence[Row]) -> None:
    for row in rows:
        if (gold := _gold(row)) is not None:
            check_gold(gold, row.get("where", ""))


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
    parser = argparse.ArgumentParser(prog="python -m molora.evaluate", description="Measure models on held-out rows.")
    add_options(parser)
    parser.add_argument("--baseline", metavar="MODEL", help="differences are against this one (default: the first)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="results, and every row's prediction")
    parser.add_argument(
        "--lm-eval", metavar="TASK,…", help="tasks of EleutherAI's lm-eval, instead of --bench or beside it"
    )
    parser.add_argument("--lm-eval-path", type=Path, metavar="DIR", help="folder with YAML tasks of your own")
    parser.add_argument("--lm-eval-chat", action="store_true", help="ask in the model's chat template")
    options = parser.parse_args(arguments)
    baseline = options.baseline or (options.model or [""])[0]
    if options.model and baseline not in options.model:
        raise UserError(f"--baseline {baseline}: is none of the models; write it as one --model is written")
    if not options.lm_eval and (options.lm_eval_path or options.lm_eval_chat):
        raise UserError("--lm-eval-path and --lm-eval-chat say how --lm-eval asks; give it too")
    if options.output:
        check_target(options.output, options.bench)
    console, results, tasks = Console(), {}, {}
    if options.bench or not options.lm_eval:
        results = measured(options)
        console.print(comparison(results, baseline, "held-out rows"))
    if options.lm_eval:
        tasks = _harness(options)
        console.print(harness.table(tasks))
    if options.output:
        _write(options, baseline, results, tasks)
        print(f"written: {options.output}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What :func:`measured` reads."""
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="base|HUB|DIR",
        help="hub name, model folder or a stage's final/ folder; base: the base model of that stage; repeatable",
    )
    parser.add_argument("--bench", action="append", default=[], metavar="FILE", help="JSONL rows; repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each bench")
    parser.add_argument(
        "--kept",
        type=Path,
        default=Path("outputs/evaluate"),
        metavar="DIR",
        help="where rows are kept as they are measured, and found again (default: %(default)s)",
    )
    cli.add_model_options(parser)


def measured(options: argparse.Namespace) -> dict[str, dict[str, BenchResult]]:
    """model -> bench -> result for the options of :func:`add_options`. Raises :class:`UserError` for bad ones."""
    cli.require_positive(options, "max_new_tokens", "batch_size", "limit")
    for name in ("model", "bench"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing: what is to be measured?")
    models = {name: _resolve(name, options.model) for name in options.model}
    short_names(list(models))  # by which the table calls them: one folder, written in two ways, is an error
    settings = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    for path in options.bench:
        _check_golds(read_rows(path)[: options.limit])  # a bad row of the last bench should not be found after hours
    results: dict[str, dict[str, BenchResult]] = {}
    total, count = len(models) * len(set(options.bench)), 0
    for name, folder in models.items():
        opened = Opened(folder, options.device, options.precision)
        results[name] = {}
        for path in dict.fromkeys(options.bench):
            count += 1
            title = f"{count}/{total} {Path(name).name} {Path(path).stem}"
            results[name][path] = evaluate_kept(
                opened, path, options.kept, limit=options.limit, title=title, **settings
            )
    return results


def _resolve(name: str, names: Sequence[str]) -> str:
    """The folder or hub name that ``--model name`` means: ``base`` is the base model of the first adapter folder."""
    if name != "base" or Path(name).exists():
        return name
    adapter = next((folder for other in names if other != name and (folder := find_adapter(other))), None)
    if adapter is None:
        raise UserError("--model base: the base of what? give an adapter as another --model, or name the base")
    return locate_base(adapter, read_manifest(adapter))


def _harness(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """model -> task -> the harness's values."""
    cli.require_positive(options, "batch_size", "limit")
    if not options.model:
        raise UserError("--model is missing: what is to be measured?")
    tasks = [task.strip() for task in options.lm_eval.split(",") if task.strip()]
    results = {}
    for name in options.model:
        opened = Opened(_resolve(name, options.model), options.device, options.precision)
        results[name] = harness.run(
            opened.model,
            opened.tokenizer,
            tasks,
            path=options.lm_eval_path,
            limit=options.limit,
            batch_size=options.batch_size,
            chat=options.lm_eval_chat,
            key=_measuring(opened),
            kept=options.kept,
        )
    return results


def _write(options: argparse.Namespace, baseline: str, results: Results, tasks: Mapping[str, Any]) -> None:
    entries = []
    for model, benches in results.items():
        for bench, result in benches.items():
            entry = {"model": model, "bench": bench} | result.to_json()
            if model != baseline:
                entry["difference"] = differences([results[baseline][bench]], [result])
            entries.append(entry)
    tree: dict[str, Any] = {
        "provenance": provenance.collect(Config(data=DataConfig(path=options.bench or None))),
        "settings": {name: getattr(options, name) for name in ("max_new_tokens", "batch_size", "limit", "precision")},
        "baseline": baseline,
        "method": METHOD,
        "results": entries,
    }
    if tasks:
        tree["lm_eval"] = {"version": harness.version(), "tasks": options.lm_eval, "results": tasks}
    write_text(options.output, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main)
