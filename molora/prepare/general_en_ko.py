"""``general-en-ko``: English and Korean instructions for stage 1, half and half.

| language | set | licence | columns used |
|---|---|---|---|
| English | [HuggingFaceTB/smol-smoltalk](https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk) | Apache-2.0 | ``messages``, ``source`` |
| Korean | [lemon-mint/smol-koreantalk](https://huggingface.co/datasets/lemon-mint/smol-koreantalk) | Apache-2.0 | ``messages`` |

Both have about 460,000 conversations, the second translated from the first by machine. A Korean question of the bench may
therefore have been trained on in English: with 25,000 of 460,000 rows drawn on either side about one in eighteen was.
Within a language no question is in both files.

English conversations whose ``source`` names maths are left out: general data should stay general, and their problems
come from where OpenR1-Math's bench comes from. The Korean set names no sources; rows with LaTeX are left out of both.
"""  # noqa: E501 # a table's row is one line

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from molora.prepare import hub, split
from molora.prepare.convert import conversation_row, unusable
from molora.prepare.rows import Row

SETS = {"en": "HuggingFaceTB/smol-smoltalk", "ko": "lemon-mint/smol-koreantalk"}

COLUMNS = {"en": ("messages", "source"), "ko": ("messages",)}

MATHS_SOURCES = re.compile("math|numina|gsm", re.IGNORECASE)
LATEX = re.compile(r"\\boxed|\\frac|\$\$|\\\[|\\\(")
HANGUL = re.compile("[가-힣]")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "general-en-ko",
        help="English and Korean instructions from smol-smoltalk and smol-koreantalk",
        description="Write general instructions, half English and half Korean (both sets Apache-2.0), and a bench.",
    )
    for language, name in SETS.items():
        parser.add_argument(f"--{language}", default=name, metavar="NAME|PATH", help="hub set or a local copy of it")
        parser.add_argument(f"--{language}-revision", default="main", help="branch, tag or commit (default: main)")
    split.add_options(parser, "data/sft_50k_en_ko_raw.jsonl", "data/sft_1k_en_ko_raw.jsonl", 50_000, 1_000)
    parser.set_defaults(prepare=prepare)


def prepare(options: argparse.Namespace) -> None:
    given = {language: getattr(options, language) for language in SETS}
    revisions = {language: getattr(options, f"{language}_revision") for language in SETS}
    recipe = {"subject": "general-en-ko", "sources": given, "revisions": revisions} | split.recipe_of(options)
    if split.up_to_date(options.out, options.bench, recipe, options.overwrite):
        print(f"{options.out}, {options.bench}: up to date")
        return
    fits = split.Fits(options.tokenizer, options.max_length)
    # Both are opened before either is read, so that a missing one is known within seconds.
    loaded = {
        language: hub.load(hub.source_of(given[language], name, None, revisions[language]), COLUMNS[language])
        for language, name in SETS.items()
    }
    train: list[Row] = []
    bench: list[Row] = []
    left_out = {}
    for number, (language, one) in enumerate(loaded.items()):
        picker = split.Picker(fits)
        rows, rows_of_bench = ((count + 1 - number) // 2 for count in (options.train_rows, options.bench_rows))
        chosen = picker.pick(candidates(one.rows, options.seed, language), rows, rows_of_bench, given[language])
        train += chosen[0]
        bench += chosen[1]
        left_out[given[language]] = dict(picker.left_out)
    for rows in (train, bench):
        random.Random(options.seed).shuffle(rows)
    sources = [one.provenance for one in loaded.values()]
    split.report(split.write(options.out, options.bench, (train, bench), recipe, sources, left_out))


def candidates(rows: Any, seed: int, language: str) -> Iterator[split.Candidate]:
    """The set's rows in an order that the seed decides, as rows of ours or as reasons why not."""
    order = list(range(len(rows)))
    random.Random(f"{seed}/{language}").shuffle(order)
    for index in order:
        yield row_of(rows[index], language)


def row_of(item: Mapping[str, Any], language: str) -> Row | str:
    """A row with ``domain`` and ``language``, or why the item gives none."""
    if MATHS_SOURCES.search(item.get("source") or ""):
        return "from a maths set"
    try:
        row = conversation_row(item["messages"])
    except (KeyError, TypeError, ValueError):
        return "not a conversation"
    if why := unusable(row):
        return why
    asked, said = split.question(row), split.answers(row)
    if LATEX.search(asked + said):
        return "with LaTeX"
    if (HANGUL.search(said) is not None) != (language == "ko"):
        return "answered in another language"
    return row | {"domain": "general", "language": language}
