"""Worked arithmetic: problems of reasoning-gym, with the steps written out from each item's own numbers.

The steps suit a small model. Every line is one operation whose operands stand right before its result, and carries
the running total, so that nothing has to be remembered from afar. There are no spaces around signs: SmolLM2's
tokenizer splits numbers into digits and gives the space before a number a token of its own, so spaces would make
the responses a seventh longer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from molora.prepare import packages
from molora.prepare.rows import Row, check_disjoint, question_key

REQUIREMENT = "reasoning-gym==0.1.25"

ANSWER_LINE = "The answer is {answer}."
"""How every response ends. math-verify reads the number from it, negative ones too."""


def chain_sum_steps(metadata: dict[str, Any]) -> tuple[list[str], int]:
    """``60 + 93 - 16`` worked out one operation a line; the lines and the total."""
    first, *rest = metadata["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        new = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total}{sign}{term}={new}")
        total = new
    return lines, total


def leg_counting_steps(metadata: dict[str, Any]) -> tuple[list[str], int]:
    """One animal a line: its legs, then the running total; the lines and the total.

    An animal is written as in the question, plural and all, so that a line begins with a plain copy; its number of
    legs, which the model has to know by heart, follows at once.
    """
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, lines = 0, []
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        line = f"{count} {animal}{'s' if count > 1 else ''}*{ANIMALS[animal]}={legs}"
        if lines:
            line += f", {total}+{legs}={total + legs}"
        total += legs
        lines.append(line)
    return lines, total


@dataclass(frozen=True)
class Task:
    config: dict[str, int]
    """Difficulty, below reasoning-gym's defaults (6 terms of 4 digits, 10 animals): rows stay short, so that both
    stages, and answers to all bench problems three times over, fit minutes of a laptop's CPU."""
    steps: Callable[[dict[str, Any]], tuple[list[str], int]]
    """From an item's metadata to its worked lines and the answer that they reach."""


TASKS = {
    "chain_sum": Task({"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}, chain_sum_steps),
    "leg_counting": Task(
        {"min_animals": 2, "max_animals": 4, "min_instances": 1, "max_instances": 15}, leg_counting_steps
    ),
}

TRAIN_ROWS, BENCH_ROWS = 2000, 120
"""Rows per task."""

SEED_SPACING = 10**9
"""reasoning-gym draws item i from ``Random(seed + i)``, so two data sets whose seeds are closer than their sizes share
items. Every (seed, split) pair gets a range of its own, this long."""


def build(seed: int) -> tuple[list[Row], list[Row]]:
    """Train and bench rows ``{"prompt", "response", "answer", "task", "domain"}``, shuffled, with no shared question.

    The bench is drawn first and train leaves its questions out, not the other way round, so that the bench keeps the
    generator's distribution; only the easiest problems (two terms of one digit) ever collide.
    """
    train: list[Row] = []
    bench: list[Row] = []
    for task in TASKS:
        taken: set[str] = set()
        bench += _draw(task, 2 * seed + 1, BENCH_ROWS, taken)
        train += _draw(task, 2 * seed, TRAIN_ROWS, taken)
    check_disjoint(train, bench)
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(bench)
    return train, bench


def _draw(task: str, stream: int, count: int, taken: set[str]) -> list[Row]:
    """The first ``count`` rows of a stream whose questions are not in ``taken``; their questions are added to it."""
    rows = []
    for row in stream_rows(task, stream):
        key = question_key(row["prompt"])
        if key in taken:
            continue
        taken.add(key)
        rows.append(row)
        if len(rows) == count:
            break
    return rows


def stream_rows(task: str, stream: int) -> Iterator[Row]:
    """The rows of one task from one stream of seeds, as they come: far more than anyone needs."""
    packages.package_folder("reasoning_gym", REQUIREMENT)
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, seed=stream * SEED_SPACING, size=SEED_SPACING, **TASKS[task].config)
    for index in range(SEED_SPACING):
        yield row_of(task, dataset[index])


def row_of(task: str, item: dict[str, Any]) -> Row:
    """A row from an item of reasoning-gym; the worked steps must reach the item's own answer."""
    lines, total = TASKS[task].steps(item["metadata"])
    assert str(total) == item["answer"], f"{task}: the steps reach {total}, the answer is {item['answer']}: {item}"
    return {
        "prompt": item["question"].strip(),
        "response": "\n".join([*lines, ANSWER_LINE.format(answer=total)]),
        "answer": item["answer"],
        "task": task,
        "domain": "maths",
    }
