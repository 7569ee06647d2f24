"""General chat in English and Korean from chatterbot-corpus (BSD licence), as prompt and response rows.

Its YAML files hold conversations, but of two kinds that nothing tells apart: in some the lines are turns, in others
every line after the first is another answer to the first. A row is one prompt and one response, so from turns only
the first exchange is taken: later turns make no sense without what came before.

Train and bench are split by question and within each language. The Korean files are in part translations of the
English ones, so a Korean question of the bench may have been trained on in English; never in Korean.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import yaml

from molora.prepare import packages
from molora.prepare.rows import Row, check_disjoint, question_key

REQUIREMENT = "chatterbot-corpus==1.3.3"

LANGUAGES = {"general-en": "english", "general-ko": "korean"}
"""Domain label of the rows, and the corpus folder that they come from."""

BENCH_QUESTIONS = {"general-en": 120, "general-ko": 70}

LEFT_OUT = {
    "coding": "square brackets with digits were lost (`numbers =`), so much of its code is wrong",
    "gossip": "made-up remarks of named people that answer nothing",
    "humor": "some fifty puns, insults among them, as answers to five prompts",
}

ALTERNATIVES = {"computers", "emotion", "food", "greetings", "literature", "psychology"}
"""Files in which every later line of a conversation answers its first."""

ECHO_IS_FINE = {"conversations", "greetings"}
"""Files in which one prompt may answer another: ``Hello`` and ``Hi``. Elsewhere such a response is a redirection from
the AIML files that the corpus grew out of (``tell me about venus``: ``what is venus``), not an answer."""

MAX_CHARS = 300
"""Longer prompts and responses are left out."""

MAX_ANSWERS = 4
"""Answers kept per question, so that no question fills the data."""


def build(seed: int) -> tuple[list[Row], list[Row]]:
    """Train and bench rows ``{"prompt", "response", "domain"}``, shuffled, with no shared question.

    The bench has one row per question, the corpus's first answer, so that each question counts once.
    """
    train: list[Row] = []
    bench: list[Row] = []
    for domain in LANGUAGES:
        groups = sorted(_by_question(domain).items())
        random.Random(f"{seed}/{domain}").shuffle(groups)
        held_out = BENCH_QUESTIONS[domain]
        bench += [rows[0] for _, rows in groups[:held_out]]
        train += [row for _, rows in groups[held_out:] for row in rows]
    check_disjoint(train, bench)
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(bench)
    return train, bench


def _by_question(domain: str) -> dict[str, list[Row]]:
    """The clean rows of a language, grouped by question, in the corpus's order and without repetitions."""
    pairs = list(_pairs(domain))
    prompts = {question_key(prompt) for _, prompt, _ in pairs}
    groups: dict[str, list[Row]] = defaultdict(list)
    for file, prompt, response in pairs:
        if question_key(response) in prompts and file not in ECHO_IS_FINE:
            continue
        question, row = groups[question_key(prompt)], {"prompt": prompt, "response": response, "domain": domain}
        if len(question) < MAX_ANSWERS and row["response"] not in [known["response"] for known in question]:
            question.append(row)
    return {key: rows for key, rows in groups.items() if rows}


def _pairs(domain: str) -> Iterator[tuple[str, str, str]]:
    """(file, prompt, response) of a language, cleaned; what is broken or in another language is left out."""
    folder = packages.package_folder("chatterbot_corpus", REQUIREMENT) / "data" / LANGUAGES[domain]
    for path in sorted(folder.glob("*.yml")):
        if path.stem in LEFT_OUT:
            continue
        for conversation in _read(path):
            # One conversation is a string by a slip of its YAML; the type says so, its length would not.
            if not isinstance(conversation, list):
                continue
            prompt, *answers = [clean(str(line)) for line in conversation]
            for response in answers if path.stem in ALTERNATIVES else answers[:1]:
                if is_usable(prompt, domain) and is_usable(response, domain) and prompt != response:
                    yield path.stem, prompt, response


def _read(path: Path) -> list[object]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where there is one, is ten times as fast
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["conversations"]


def clean(text: str) -> str:
    """One line of plain text: composed Unicode, single spaces, no quotes around the whole, no shouting."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1].strip()
    return text.capitalize() if text.isascii() and text.isupper() and " " in text else text


def is_usable(text: str, domain: str) -> bool:
    """Neither empty nor too long, and in the language that the file claims."""
    if not question_key(text) or len(text) > MAX_CHARS or question_key(text) == "it":  # "it": an answer cut off
        return False
    hangul = re.search(r"[가-힣]", text) is not None
    return hangul if domain == "general-ko" else not hangul
