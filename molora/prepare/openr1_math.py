r"""``openr1-math``: chain-of-thought rows for stage 2 from OpenR1-Math-220k (Apache-2.0).

The set (https://huggingface.co/datasets/open-r1/OpenR1-Math-220k, configuration ``default``, 93,733 problems) has for
every problem several generations of DeepSeek-R1, and flags beside each:

- ``problem``, ``answer``: strings; the answer is LaTeX or a number;
- ``generations``: strings, ``<think>`` trace ``</think>`` write-up, the last formula of which is ``\boxed{}``;
- ``is_reasoning_complete``: whether a generation has both parts;
- ``correctness_math_verify``, ``correctness_llama``: whether its answer was found right by rules or, where the rules
  could not read it, by a language model; the second list is null where nothing was asked.

A row is taken if a generation is complete and was found right by rules, and if what we write reads as the right answer
with the very code that scores a bench (:func:`molora.answers.is_correct`). So a bench never asks for an answer that
its own reference would miss.

By default the response is the **write-up** after ``</think>``: a worked solution of a few hundred tokens. The **trace**
(``--response trace``) runs to thousands, of which ``data.max_length=1024`` would keep the first part and never
the answer.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from molora.answers import check_gold, is_correct
from molora.errors import UserError
from molora.prepare import hub, split
from molora.prepare.rows import Row

NAME = "open-r1/OpenR1-Math-220k"
COLUMNS = ("problem", "answer", "generations", "is_reasoning_complete", "correctness_math_verify")
RESPONSES = ("write-up", "trace")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "openr1-math",
        help="verified chain-of-thought rows from OpenR1-Math-220k",
        description="Write verified maths rows and a bench of other problems from OpenR1-Math-220k (Apache-2.0).",
    )
    parser.add_argument("--source", default=NAME, metavar="NAME|PATH", help="hub set or a local copy of it")
    parser.add_argument("--config", default="default", help="configuration of the set (default: %(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: %(default)s)")
    parser.add_argument(
        "--response",
        choices=RESPONSES,
        default=RESPONSES[0],
        help="what follows </think>, or everything (default: %(default)s)",
    )
    split.add_options(
        parser, "data/reasoning/openr1_math_40k.jsonl", "data/reasoning/openr1_math_1k.jsonl", 40_000, 1_000
    )
    parser.set_defaults(prepare=prepare)


def prepare(options: argparse.Namespace) -> None:
    recipe = {"subject": "openr1-math", "source": options.source, "config": options.config}
    recipe |= {"revision": options.revision, "response": options.response} | split.recipe_of(options)
    if split.up_to_date(options.out, options.bench, recipe, options.overwrite):
        print(f"{options.out}, {options.bench}: up to date")
        return
    loaded = hub.load(hub.source_of(options.source, NAME, options.config, options.revision), COLUMNS)
    picker = split.Picker(split.Fits(options.tokenizer, options.max_length))
    rows = picker.pick(
        candidates(loaded.rows, options.seed, options.response), options.train_rows, options.bench_rows, options.source
    )
    left_out = {options.source: dict(picker.left_out)}
    split.report(split.write(options.out, options.bench, rows, recipe, [loaded.provenance], left_out))


def candidates(rows: Any, seed: int, response: str) -> Iterator[split.Candidate]:
    """The set's rows in an order that the seed decides, as rows of ours or as reasons why not."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for index in order:
        yield row_of(rows[index], response)


def row_of(item: Mapping[str, Any], response: str) -> Row | str:
    """``{"prompt", "response", "answer", "domain"}``, or why the item gives none."""
    problem, answer = (item["problem"] or "").strip(), (item["answer"] or "").strip()
    if not problem or not answer:
        return "without problem or answer"
    try:
        check_gold(answer)
    except UserError:
        return "answer that math-verify cannot read"
    generations = [one for one in verified(item) if response == "trace" or write_up(one)]
    if not generations:
        return "no complete and verified generation"
    # The shortest: of two right solutions the one with fewer detours.
    text = min((one if response == "trace" else write_up(one) for one in generations), key=len)
    if not is_correct(answer, text):
        return "response in which the answer is not found"
    return {"prompt": problem, "response": text, "answer": answer, "domain": "maths"}


def verified(item: Mapping[str, Any]) -> list[str]:
    """The generations that are complete and were found right by rules."""
    columns = [item[column] or [] for column in COLUMNS[2:]]
    return [text.strip() for text, complete, right in zip(*columns, strict=False) if text and complete and right]


def write_up(generation: str) -> str:
    """What follows the trace; empty if nothing does."""
    return re.split(r"</think>", generation, maxsplit=1)[1].strip() if "</think>" in generation else ""
