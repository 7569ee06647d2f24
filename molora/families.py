"""Which modules a decoder layer of each architecture has. A new family is a new row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from molora.errors import UserError


@dataclass(frozen=True)
class Family:
    """Paths are relative to the model (``layers``) or to one decoder layer (the rest)."""

    layers: str = "model.layers"
    attention: str = "self_attn"
    """Where attention LoRAs may go; "" for anywhere."""
    mlp: str = "mlp"
    shared_inputs: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    )
    """Projections that read one tensor, in the order in which the layer calls them."""
    swiglu: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    """The MLP's projections if it is ``down(silu(gate(x)) * up(x))`` whenever ``hidden_act`` is silu, else None."""
    fused: Mapping[str, str] = field(default_factory=dict)
    """Projections by Llama's name that are part of a wider linear here, and its name; the adapter is the whole's."""

    def names(self, keywords: Sequence[str]) -> list[str]:
        """``keywords`` as this architecture spells them, each once."""
        return list(dict.fromkeys(self.fused.get(keyword, keyword) for keyword in keywords))


_GEGLU = Family(swiglu=None)
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": _GEGLU,
    "gemma2": _GEGLU,
    "gemma3_text": _GEGLU,
    "gemma3": Family(layers="model.language_model.layers", swiglu=None),  # with a vision tower, which stays as it is
    "phi3": Family(
        shared_inputs=(),
        swiglu=None,
        fused={
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
        },
    ),
}


def family_of(model: nn.Module) -> Family:
    """The row for ``model.config.model_type``.

    An architecture without one is taken projection by projection, each on its own: its decoder layers are the longest
    list of modules in its decoder (a vision tower is outside of it), and ``injection.target_keywords`` and
    ``attn_lora.keywords`` name the linears.

    Raises:
        UserError: no such list.
    """
    name = getattr(getattr(model, "config", None), "model_type", None)
    if name in FAMILIES:
        return FAMILIES[name]
    decoder = getattr(model, "get_decoder", lambda: model)()
    start = next(path for path, module in model.named_modules() if module is decoder)
    lists = {
        path: len(module) for path, module in decoder.named_modules(prefix=start) if isinstance(module, nn.ModuleList)
    }
    longest = [path for path, length in lists.items() if length == max(lists.values())]
    if len(longest) != 1:
        raise UserError(
            f"architecture {name!r} has no row in molora/families.py, and its decoder layers are not plain to see "
            f"(module lists: {lists or 'none'}); add a row. Rows so far: {', '.join(FAMILIES)}"
        )
    return Family(layers=longest[0], attention="", shared_inputs=(), swiglu=None)
