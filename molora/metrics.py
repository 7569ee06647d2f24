"""What a run measures: gathered on the device step by step, written to ``metrics.jsonl`` and, if asked, to trackers."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from molora.data import Batch
from molora.trackers import Tracker

FILE = "metrics.jsonl"
MOST_DOMAINS, OTHER = 8, "other domains"
"""So many domains, those with most rows, are logged by name; the rest together."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Measured:
    """One optimizer step; the tensors are on the device, without graph."""

    batch_losses: Tensor
    """(M,): each micro-batch's share of the cross-entropy per label token, in nats, without the router losses."""
    z_loss: Tensor
    """()"""
    load_balance: Tensor
    """()"""
    grad_norm: Tensor
    """(): 2-norm of the whole gradient before clipping."""
    tensor_norms: Tensor
    """(P,): the same of each tensor that was open."""
    skipped: Tensor
    """() bool: something was not finite, and nothing was changed."""
    load: Tensor
    """(routers, E): share of the choices that went to each expert; rows sum to 1."""
    tensors: Sequence[str]
    """P names."""
    where: list[list[str]]
    """``file:line`` of the rows of each micro-batch."""
    lr: float
    tokens: int | Tensor
    """Tokens that are not padding, of all processes."""
    domain_counts: Tensor | None = None
    """(D, routers, E), where asked for: tokens of each domain that chose each expert."""

    @property
    def loss(self) -> Tensor:
        """() cross-entropy per label token, in nats."""
        return self.batch_losses.sum()


_COLUMNS = ("loss", "z_loss", "load_balance", "grad_norm", "skipped")


@dataclass(frozen=True)
class Interval:
    """The steps between two readings."""

    last_step: int
    measured: list[Measured]
    columns: list[dict[str, float]]
    """``loss``, ``z_loss``, ``load_balance``, ``grad_norm`` and ``skipped`` (0 or 1) of each step."""
    seconds: float
    waited: float
    """Seconds of them that the loop waited for data."""

    def steps(self) -> Iterator[tuple[int, Measured, float, bool]]:
        """(step, what was measured, loss, skipped)"""
        first = self.last_step - len(self.measured) + 1
        for i, (measured, values) in enumerate(zip(self.measured, self.columns, strict=True)):
            yield first + i, measured, values["loss"], bool(values["skipped"])

    def updates(self) -> list[tuple[int, float, Measured]]:
        """(step, loss, what was measured) of the steps that were not skipped."""
        return [(step, loss, measured) for step, measured, loss, skipped in self.steps() if not skipped]

    def mean_load(self) -> list[list[float]]:
        """(routers, E), over the steps that were not skipped."""
        return torch.stack([measured.load for _, _, measured in self.updates()]).mean(0).tolist()

    def domain_counts(self) -> Tensor | None:
        """(D, routers, E) on the CPU, over the steps that were not skipped; None where nothing was counted."""
        counted = [m.domain_counts for _, _, m in self.updates() if m.domain_counts is not None]
        return torch.stack(counted).sum(0).cpu() if counted else None

    def values(self) -> dict[str, float]:
        """What goes to the log: means over the steps that were not skipped (none if all were) and speeds."""
        updates = [values for values in self.columns if not values["skipped"]]
        means = {name: math.fsum(v[name] for v in updates) / len(updates) for name in _COLUMNS[:-1] if updates}
        return means | {
            "lr": self.measured[-1].lr,
            "tokens_per_second": float(sum(m.tokens for m in self.measured)) / self.seconds,
            "seconds_per_step": self.seconds / len(self.measured),
            "data_wait_share": self.waited / self.seconds,
        }


class Domains:
    """The domains of a run's rows, those with most rows first, so that their tokens can be told apart."""

    def __init__(self, spans: Iterable[tuple[str, int]]) -> None:
        rows = Counter(domain for domain, _ in spans)
        most = [domain for domain, _ in sorted(rows.items(), key=lambda item: (-item[1], item[0]))]
        self.names = most if len(most) <= MOST_DOMAINS else [*most[: MOST_DOMAINS - 1], OTHER]
        self._number = {domain: min(i, len(self.names) - 1) for i, domain in enumerate(most)}

    def of_tokens(self, batch: Batch) -> Tensor:
        """(B, T) int8 on the batch's device: the number of each token's domain, -1 for padding."""
        numbers = torch.full(batch.input_ids.shape, -1, dtype=torch.int8)
        for row, spans in zip(numbers, batch.spans, strict=True):
            start = 0
            for domain, length in spans:
                row[start : start + length] = self._number[domain]
                start += length
        return numbers.to(batch.input_ids.device, non_blocking=True)

    def load(self, counts: Tensor, routers: Sequence[str], top_k: int) -> dict[str, Any]:
        """``counts`` (D, routers, E) as plain data: for each domain that was seen its tokens and, for each router, the
        share of the choices that went to each expert."""
        found = {}
        for domain, of_domain in zip(self.names, counts, strict=True):
            if tokens := round(float(of_domain[0].sum()) / top_k):
                shares = [[round(share, 4) for share in row] for row in (of_domain / (top_k * tokens)).tolist()]
                found[domain] = {"tokens": tokens, "load": dict(zip(routers, shares, strict=True))}
        return found


class Meter:
    """Holds what steps measured until it is read: once per interval, so that the device is waited for only then."""

    def __init__(self) -> None:
        self._steps: list[Measured] = []
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, measured: Measured) -> None:
        self._steps.append(measured)

    def timing(self, source: Iterable[Item]) -> Iterator[Item]:
        """The items of ``source``, with the time that the loop waits for each of them counted."""
        iterator = iter(source)
        while True:
            began = time.perf_counter()
            item = next(iterator, None)
            self._waited += time.perf_counter() - began
            if item is None:
                return
            yield item

    def restart_clock(self) -> None:
        """Leave the time since the last reading (evaluation, saving) out of the next interval's speed."""
        self._started, self._waited = time.perf_counter(), 0.0

    def read(self, step: int) -> Interval:
        """The interval that ends after step ``step``; the next begins. Waits for the device."""
        steps, self._steps = self._steps, []
        table = torch.stack([torch.stack([getattr(m, name).float() for name in _COLUMNS]) for m in steps]).tolist()
        columns: list[dict[str, float]] = [dict(zip(_COLUMNS, row, strict=True)) for row in table]
        interval = Interval(step, steps, columns, time.perf_counter() - self._started, self._waited)
        self.restart_clock()
        return interval


class Log:
    """Appends to ``folder/metrics.jsonl``; a resumed run goes on as if it had never stopped.

    Lines of steps after ``step``, written by the interrupted run but not part of its checkpoint, are taken back
    first, as is a last line that was cut by a crash. Use as a context manager, which closes ``trackers`` too. With
    ``silent`` it writes no file.
    """

    def __init__(self, folder: Path, *, step: int, trackers: Sequence[Tracker] = (), silent: bool = False) -> None:
        path = folder / FILE
        if not silent:
            _keep_up_to(path, step)
        self._trackers = trackers
        self._file = (Path(os.devnull) if silent else path).open("a", encoding="utf-8")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    def write(self, step: int, **values: Any) -> None:
        """One line with ``step`` and ``values``; numbers go to the trackers too."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers if numbers else ():
            tracker.write(step, numbers)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without a last one that a crash has cut."""
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def _keep_up_to(path: Path, step: int) -> None:
    if path.exists():
        kept = [entry for entry in read(path) if entry["step"] <= step]
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        aside.replace(path)
