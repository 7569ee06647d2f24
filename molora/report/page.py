"""One HTML page of pictures, tables and coloured text, with everything in it: it needs no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora.colours import COLOURS, ink
from molora.errors import UserError
from molora.files import write_text
from molora.report.pictures import Panel, svg

TEMPLATE = Path(__file__).parent / "page.html"


@dataclass(frozen=True)
class Table:
    """Cells are text; those after the first ``text_columns`` are aligned as numbers."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Section:
    """Something to see, and how it was computed."""

    title: str
    how: str
    panels: Sequence[Panel] = ()
    table: Table | None = None
    says: Sequence[str] = ()
    experts: int = 0
    """So many colours are explained above the pictures."""


@dataclass(frozen=True)
class Text:
    """A row, token by token."""

    title: str
    prompt: str
    tokens: Sequence[tuple[str, dict[str, str]]]
    """(what the token adds to the text, for each model the leading expert at each router: a character of DIGITS)"""


DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_"
"""Expert e as one character; 64 experts are as many as a configuration allows."""


@dataclass(frozen=True)
class TextView:
    """Texts whose tokens are coloured by one router of one model; which, can be chosen on the page."""

    texts: Sequence[Text]
    models: Sequence[str]
    kinds: dict[str, dict[int, int]]
    """As :func:`molora.routing.by_kind` gives it."""
    first: tuple[str, str, int]
    """(model, kind, layer) that is shown at first, and without JavaScript always."""
    experts: int


@dataclass(frozen=True)
class Page:
    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    view: TextView | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the numbers come from: shown at the foot."""


def write(page: Page, path: Path) -> None:
    """Write the page. Raises :class:`UserError` if jinja2 is missing or the file cannot be written."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise UserError("pages need the package jinja2: pip install 'molora[report]'") from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    colours = [(colour, ink(colour)) for colour in COLOURS]
    write_text(path, template.render(page=page, svg=svg, colours=colours, DIGITS=DIGITS))
