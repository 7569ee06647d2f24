"""Watches a run while it trains: steps that had to be skipped, spikes of the loss, routers that collapse, tensors that
do not train.

Everything is judged from what an interval of steps left behind (:class:`molora.metrics.Interval`), when the numbers are
read anyway. What the guard remembers is not part of a checkpoint: a resumed run watches afresh.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from molora.checkpoint import Progress
from molora.distributed import local
from molora.layers import LoraLinear
from molora.metrics import Interval, Measured
from molora.patch import parameter_groups
from molora.routing import ledger_of

LASTING = 10
"""Readings in a row after which something seen at each of them is no accident."""
STARVED = 0.01
"""Share of the tokens below which an expert is as good as lost."""
FLAT = 0.05
"""Entropy of a router's load, from 0 (all tokens chose the same k experts) to 1 (balance), that counts as collapse."""
SPIKE_NATS, SPIKE_DEVIATIONS = 0.5, 10.0
"""A loss is a spike if it lies above the recent median by both this and so many median absolute deviations."""
PATIENCE = 10
"""Steps of a phase after which every open tensor must have had a gradient and moved. The first has none for A, whose
gradient is multiplied by B = 0."""


@dataclass
class Findings:
    """What a reading brought to light."""

    warnings: list[tuple[int, str]] = field(default_factory=list)
    """(step, what is wrong)"""
    stop: str | None = None
    """Why the run must not go on."""


class Guard:
    """Judges one run of ``model``. ``max_skipped`` steps without an update in a row end it. ``add`` adds a tensor over
    the processes that the parameters are spread over."""

    def __init__(
        self, model: nn.Module, max_skipped: int, add: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    ) -> None:
        self.model, self.max_skipped, self.add = model, max_skipped, add
        self._losses: deque[float] = deque(maxlen=100)
        self._spiking = False
        self._collapsing = _Streaks()
        self._open: list[tuple[str, nn.Parameter]] = []

    def enter_phase(self) -> None:
        """Take note of what is open now, and of its values."""
        members = [member for group in parameter_groups(self.model).values() for member in group]
        self._open = [(name, p) for name, p in members if p.requires_grad]
        self._start = self._fingerprints()
        self._had_gradient = torch.zeros(len(self._open), dtype=torch.bool)
        self._steps = 0
        self._updating = False  # some step had a learning rate above 0

    def judge(self, interval: Interval, progress: Progress) -> Findings:
        """Look at the steps since the last reading; counts the skipped ones in ``progress``."""
        findings = Findings()
        self._judge_skipped(interval, progress, findings)
        losses = [loss for _, loss, _ in interval.updates()]
        if not losses or findings.stop:
            return findings
        step = interval.last_step
        found = [*self._spike(interval), *self._collapse(interval), *self._idle(interval)]
        findings.warnings += [(at or step, text) for at, text in found]
        return findings

    # --- steps that are not finite --------------------------------------------------------------------------------

    def _judge_skipped(self, interval: Interval, progress: Progress, findings: Findings) -> None:
        for step, measured, loss, skipped in interval.steps():
            if not skipped:
                progress.skipped_in_a_row = 0
                continue
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            what = f"{_what_is_not_finite(measured, loss)}; rows {_rows(measured)}"
            findings.warnings.append((step, f"{what}; the step is skipped ({progress.skipped} so far)"))
            if progress.skipped_in_a_row >= self.max_skipped and not findings.stop:
                weights = not_finite(self.model, self.add)
                findings.stop = (
                    f"{self.max_skipped} steps in a row, up to step {step}, changed nothing "
                    f"(training.max_skipped_steps): {weights + ' is not finite; ' if weights else ''}{what}. "
                    "What checkpoints there are hold earlier states; mend those rows or lower training.lr, and train "
                    "again"
                )

    # --- alarms ---------------------------------------------------------------------------------------------------

    def _spike(self, interval: Interval) -> Iterable[tuple[int | None, str]]:
        for step, loss, _ in interval.updates():
            spiking = False
            if len(self._losses) >= 20:
                median = statistics.median(self._losses)
                deviation = statistics.median(abs(before - median) for before in self._losses)
                spiking = loss - median > max(SPIKE_NATS, SPIKE_DEVIATIONS * deviation)
                if spiking and not self._spiking:
                    yield step, f"loss spike: {loss:.3f}, and {median:.3f} in the middle of {len(self._losses)} before"
            self._spiking = spiking
            self._losses.append(loss)

    def _collapse(self, interval: Interval) -> Iterable[tuple[int | None, str]]:
        ledger = ledger_of(self.model)
        seen = {f"expert {expert} of {name}: no gradient" for name, expert in self._experts_without_gradient()}
        if 1 <= ledger.top_k < ledger.experts:
            span = math.log(ledger.experts) - math.log(ledger.top_k)
            for name, load in zip(ledger.names, interval.mean_load(), strict=True):
                entropy = -sum(share * math.log(share) for share in load if share > 0)
                if (entropy - math.log(ledger.top_k)) / span < FLAT:
                    seen.add(f"{name}: nearly all tokens go to the same {ledger.top_k} of {ledger.experts} experts")
                for expert, share in enumerate(load):
                    if share * ledger.top_k < STARVED:
                        seen.add(f"expert {expert} of {name}: under {STARVED:.0%} of the tokens")
        if lasting := self._collapsing.update(seen):
            yield None, f"routers collapse, as the last {LASTING} readings say: {_listed(lasting, '; ')}"

    def _experts_without_gradient(self) -> Iterable[tuple[str, int]]:
        names: list[tuple[str, int]] = []
        norms: list[torch.Tensor] = []
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLinear) and module.experts > 1 and module.lora_b.grad is not None:
                names += [(name, expert) for expert in range(module.experts)]
                gradient = local(module.lora_b.grad)
                norms.append(gradient.unflatten(1, (module.experts, module.rank)).abs().sum((0, 2)))
        found = self.add(torch.cat(norms)).tolist() if norms else []
        return [name for name, value in zip(names, found, strict=True) if value == 0]

    # --- tensors that do not train --------------------------------------------------------------------------------

    def _idle(self, interval: Interval) -> Iterable[tuple[int | None, str]]:
        """Once in a phase, when it has run a while: tensors without gradient, and others that are where they were."""
        if self._steps >= PATIENCE or not self._open:
            return
        names = [name for name, _ in self._open]
        updates = [m for _, _, m in interval.updates() if m.tensors == names]  # the phase may have begun since
        if updates:
            self._had_gradient |= torch.stack([m.tensor_norms for m in updates]).amax(0).cpu() > 0
        self._updating |= any(measured.lr > 0 for measured in updates)
        self._steps += len(updates)
        if self._steps < PATIENCE:
            return
        had = self._had_gradient.tolist()
        if without := [name for (name, _), had_one in zip(self._open, had, strict=True) if not had_one]:
            yield None, f"trainable, but without a gradient in {self._steps} steps: {_listed(without)}"
        if self._updating:
            moved = (self._fingerprints() != self._start).tolist()
            still = [name for (name, _), m, had_one in zip(self._open, moved, had, strict=True) if had_one and not m]
            if still:
                yield None, f"trainable, but not moved in {self._steps} steps: {_listed(still)}"

    def _fingerprints(self) -> torch.Tensor:
        """(P,) int64: sums of the bits of open fp32 tensors, which any update changes, however small."""
        values = [local(p.detach()).contiguous().view(torch.int32) for _, p in self._open]
        sums = [value.sum(dtype=torch.int64) for value in values]
        return self.add(torch.stack(sums)).cpu() if sums else torch.zeros(0, dtype=torch.int64)


class _Streaks:
    """What was seen again and again; each is told when it has lasted, and again only after it was gone."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}

    def update(self, seen: set[str]) -> list[str]:
        self._count = {what: self._count.get(what, 0) + 1 for what in sorted(seen)}
        return [what for what, count in self._count.items() if count == LASTING]


def not_finite(model: nn.Module, add: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> str | None:
    """The first adapter tensor of ``model`` with an element that is not finite, or None. ``add`` as for
    :class:`Guard`."""
    members = [member for group in parameter_groups(model).values() for member in group]
    broken = add(torch.stack([(~local(p.detach()).isfinite()).sum() for _, p in members])).tolist()
    return next((name for (name, _), count in zip(members, broken, strict=True) if count), None)


def _what_is_not_finite(measured: Measured, loss: float) -> str:
    if not math.isfinite(loss):
        return f"loss is {loss}"
    norms = measured.tensor_norms.tolist()
    names = [name for name, norm in zip(measured.tensors, norms, strict=True) if not math.isfinite(norm)]
    return f"gradient of {_listed(names)} is not finite" if names else "the norm of the gradient overflows"


def _rows(measured: Measured) -> str:
    """The rows of the micro-batches whose loss is not finite; of all if it is the gradient alone."""
    bad = [not math.isfinite(loss) for loss in measured.batch_losses.tolist()]
    chosen = [rows for rows, b in zip(measured.where, bad, strict=True) if b or not any(bad)]
    return _listed([row for rows in chosen for row in rows], most=32)


def _listed(items: list[str], separator: str = ", ", most: int = 4) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
