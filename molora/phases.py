"""Which parameter groups train at which optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from molora.config import Phase
from molora.patch import parameter_groups


def in_force(phases: Sequence[Phase], step: int) -> int:
    """Index of the phase that optimizer step ``step`` (counted from 0) belongs to; ``phases`` start at 0 and rise."""
    return max(i for i, phase in enumerate(phases) if phase.step <= step)


def enter(model: nn.Module, phase: Phase) -> str:
    """Open the phase's groups and close the others; returns a line that says what trains now.

    Groups that this model does not have (no router in ``dense_lora``) are passed over. Closed parameters lose their
    gradient, so that the optimizer leaves them, their moments included, as they are.
    """
    opened: list[str] = []
    closed: list[str] = []
    for group, members in parameter_groups(model).items():
        trains = group in phase.trainable
        for _, parameter in members:
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
        if members:
            elements = sum(parameter.numel() for _, parameter in members)
            (opened if trains else closed).append(f"{group} {len(members)} tensors {elements:,} elements")
    frozen = f" | frozen: {', '.join(closed)}" if closed else ""
    return f"phase from step {phase.step} | trains: {', '.join(opened)}{frozen}"
