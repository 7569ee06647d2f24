"""A measurement kept on disk batch by batch, so that one that was killed goes on where it was.

    {"key": "5ebf…", "of": {…}}                  what was measured, on what, how; first for people to read
    {"key": "5ebf…", "part": "loss", "rows": {"17": [8.25, 11], …}, "tokens": 512, "seconds": 1.5}
    {"key": "5ebf…", "finished": 240}            so many rows of the bench, from its beginning, are all there

Only lines under one's own key count. Reading writes nothing; writing only ever appends, a line in one call, so that
processes that measure the same at once keep each other's lines. A line that a crash cut off is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molora.errors import UserError


def digest(key: Mapping[str, Any]) -> str:
    """A key in 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


class Lines:
    """JSON objects in a file of lines, those under ``key`` alone."""

    def __init__(self, key: Mapping[str, Any], path: Path) -> None:
        self.path = path
        self._of, self._key = key, digest(key)

    def read(self) -> Iterator[dict[str, Any]]:
        """All that were added, in this process or another; none if there is no such file."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off by a crash
            if isinstance(entry, dict) and entry.pop("key", None) == self._key and "of" not in entry:
                yield entry

    def begin(self) -> None:
        """Write down what the key stands for, so that a place that cannot be written shows before anything is measured.

        Raises :class:`UserError` if it cannot, as :meth:`add` does.
        """
        self.add({"of": self._of})

    def add(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps({"key": self._key} | dict(entry)).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:  # unbuffered and appending: whole lines, one after another
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                if file.read(1) not in (b"", b"\n"):  # the last one was cut off
                    line = b"\n" + line
                if file.write(line) != len(line):
                    raise OSError("the disk is full")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error


class Journal:
    """Rows by part of a measurement, in memory and, with a ``path``, in a file."""

    def __init__(self, key: Mapping[str, Any], path: Path | None = None) -> None:
        self._lines = None if path is None else Lines(key, path)
        self._rows: dict[str, dict[int, Any]] = {}
        self._tokens: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._finished = 0
        for entry in self._lines.read() if self._lines else ():
            self._take(entry)

    def begin(self) -> None:
        """As :meth:`Lines.begin`."""
        if self._lines:
            self._lines.begin()

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
        if self._lines:
            self._lines.add(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        if "finished" in entry:
            self._finished = max(self._finished, entry["finished"])
            return
        part = entry["part"]
        self._rows.setdefault(part, {}).update((int(i), row) for i, row in entry["rows"].items())
        self._tokens[part] = self._tokens.get(part, 0) + entry["tokens"]
        self._seconds[part] = self._seconds.get(part, 0) + entry["seconds"]
