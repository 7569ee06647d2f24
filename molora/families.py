"""Which modules a decoder layer of each architecture has. A new family is a new row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from molora.errors import UserError


@dataclass(frozen=True)
class Family:
    """Paths are relative to the model (``layers``) or to one decoder layer (the rest)."""

    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    shared_inputs: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    )
    """Projections that read one tensor, in the order in which the layer calls them."""
    swiglu: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    """The MLP's projections if it is ``down(silu(gate(x)) * up(x))`` whenever ``hidden_act`` is silu, else None."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}


def family_of(model: nn.Module) -> Family:
    """The row for ``model.config.model_type``; :class:`UserError` if there is none."""
    name = getattr(getattr(model, "config", None), "model_type", None)
    if name not in FAMILIES:
        raise UserError(f"architecture {name!r} has no row in molora/families.py; rows so far: {', '.join(FAMILIES)}")
    return FAMILIES[name]
