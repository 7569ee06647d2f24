"""A measurement kept on disk batch by batch, so that one that was killed goes on where it was.

    line 1          the key: what was measured, on what, how
    further lines   {"part": "loss", "rows": {"17": [8.25, 11], …}, "tokens": 512, "seconds": 1.5}
    at the end      {"finished": 240}: so many rows of the bench, from its beginning, are all there

A file is continued only under the same key. A line that a crash cut off is measured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molora.errors import UserError
from molora.files import write_text


class Journal:
    """Rows by part of a measurement, in memory and, with a ``path``, in a file.

    Raises :class:`UserError` if the file cannot be written.
    """

    def __init__(self, key: Mapping[str, Any], path: Path | None = None) -> None:
        self.path = path
        self._rows: dict[str, dict[int, Any]] = {}
        self._tokens: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._finished = 0
        first = json.dumps({"key": key}, sort_keys=True)
        if path is None:
            return
        whole = [first]
        for line, entry in _entries(path, first):
            self._take(entry)
            whole.append(line)
        write_text(path, "".join(line + "\n" for line in whole))

    def rows(self, part: str) -> Mapping[int, Any]:
        """What is known of each row by its number in the bench."""
        return self._rows.get(part, {})

    def speed(self, part: str) -> float | None:
        """Tokens per second over all batches, in this process or an earlier one; None if there were none."""
        return self._tokens[part] / self._seconds[part] if self._seconds.get(part) else None

    @property
    def seconds(self) -> float:
        """What all batches took."""
        return sum(self._seconds.values())

    def add(self, part: str, rows: Mapping[int, Any], tokens: int, seconds: float) -> None:
        """One batch: rows by number, the tokens that the speed counts, and how long it took."""
        self._write({"part": part, "rows": {str(i): row for i, row in rows.items()}}, tokens=tokens, seconds=seconds)

    def finished(self, count: int) -> bool:
        """Whether the first ``count`` rows of the bench were measured, as far as there is anything to measure."""
        return count <= self._finished

    def finish(self, count: int) -> None:
        """Note that they were."""
        self._write({"finished": count})

    def _write(self, entry: dict[str, Any], **numbers: float) -> None:
        entry |= numbers
        self._take(entry)
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def _take(self, entry: Mapping[str, Any]) -> None:
        if "finished" in entry:
            self._finished = max(self._finished, entry["finished"])
            return
        part = entry["part"]
        self._rows.setdefault(part, {}).update((int(i), row) for i, row in entry["rows"].items())
        self._tokens[part] = self._tokens.get(part, 0) + entry["tokens"]
        self._seconds[part] = self._seconds.get(part, 0) + entry["seconds"]


def _entries(path: Path, first: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines after the first, if that is ``first``, up to one that is not whole."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    if not lines or lines[0] != first:
        return
    for line in lines[1:]:
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            return
