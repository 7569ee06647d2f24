"""Adapters that MoE-PEFT, or its ancestor mixlora, trained as MixLoRA (arXiv 2404.15159), read as molora's.

MoE-PEFT saves ``adapter_config.json`` and ``adapter_model.bin``: beside plain LoRAs on attention, for each MLP a router
and experts that are whole MLPs (:class:`molora.layers.ExpertMLPs`). The arithmetic is molora's, but for ``top_k: 1``,
whose only gate is 1 there and the router's probability here.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molora.adapter import adapter_tensors
from molora.config import Injection, check
from molora.errors import UserError
from molora.patch import inject

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.bin"
_ROUTER = re.compile(r"mixlora\.layers\.(\d+)\.mlp\.moe_gate\.weight")


def recognises(folder: Path) -> bool:
    """Whether the folder says that it holds a MixLoRA."""
    try:
        return json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("peft_type") == "MIXLORA"
    except (OSError, ValueError, AttributeError):
        return False


def put_on(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Patch ``model``, the base that the run started from, in place with the adapter of a folder.

    Raises:
        UserError: files missing or not readable, another routing than top-k, ``top_k: 1``, DoRA, experts of another
            rank or scaling than attention's LoRAs, or a model that its tensors do not fit.
    """
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    try:
        saved = torch.load(folder / _TENSORS, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / _TENSORS}: its weights cannot be read ({told})") from error
    layers = {int(match[1]) for match in map(_ROUTER.fullmatch, saved) if match}
    plain = {name.split(".")[-3] for name in saved if ".self_attn." in name}
    if not layers:
        raise UserError(f"{folder / _TENSORS}: no routers (…mlp.moe_gate.weight) in it; the adapter is not whole")
    injection = _injection(folder / _CONFIG, config) | {
        "layer_indices": sorted(layers),
        "target_keywords": ["gate_proj", "up_proj", "down_proj"],
        "attn_lora": {"enabled": bool(plain), "keywords": sorted(plain) or ["q_proj"]},
    }
    shape = {
        "injection": check(Injection, injection, where=str(folder)).model_dump(),
        "moe": {"router_scope": "mlp", "expert_scope": "mlp"},
    }
    inject(model, shape)
    _load(model, saved, folder / _TENSORS)
    return model


def _injection(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of ``injection`` that the configuration decides."""
    experts = config | config.get("expert_lora", {})
    try:
        if config["routing_strategy"] != "mixlora":
            raise UserError(f"{path}: routing_strategy is {config['routing_strategy']}; only mixlora can be imported")
        if any(of.get("use_dora") for of in (config, experts)):
            raise UserError(f"{path}: use_dora is true; molora has no DoRA")
        if config.get("act_fn") not in (None, "silu"):
            raise UserError(f"{path}: act_fn is {config['act_fn']}; molora's MLP has silu")
        if config["top_k"] == 1:
            raise UserError(f"{path}: top_k is 1; MixLoRA then weighs the expert by 1, molora by its probability")
        (rank, alpha), of_attention = (_rank_and_alpha(of) for of in (experts, config))
        if (rank, alpha) != of_attention:
            raise UserError(
                f"{path}: r and alpha are {rank, alpha} for experts, {of_attention} for attention; molora has one pair"
            )
        return {
            "num_experts": config["num_experts"],
            "top_k": config["top_k"],
            "lora_r": rank,
            "lora_alpha": alpha,
            "lora_dropout": experts["lora_dropout"],
        }
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing") from error


def _rank_and_alpha(config: dict[str, Any]) -> tuple[int, float]:
    """Alpha such that ``alpha / r`` is the scaling, which is ``alpha / sqrt(r)`` there with ``use_rslora``."""
    rank, alpha = config["r"], float(config["lora_alpha"])
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


@torch.no_grad()
def _load(model: PreTrainedModel, saved: Mapping[str, Tensor], path: Path) -> None:
    left = dict(saved)
    for name, tensor in adapter_tensors(model):
        module, _, kind = name.rpartition(".")
        layer = "mixlora." + module[module.index("layers.") :]
        if module.endswith(".router"):
            names = [f"{layer.removesuffix('router')}moe_gate.weight"] if kind == "weight" else []
        else:
            projection: Any = model.get_submodule(module)
            of = [f".experts.{e}" for e in range(projection.experts)] if projection.group == "lora" else [""]
            names = [f"{layer}{each}.lora_{kind[-1].upper()}.weight" for each in of]
        parts = [left.pop(each) for each in names if each in left]
        if len(parts) not in (0, len(names)) or (names and not parts and kind == "weight"):
            raise UserError(f"{path}: has {len(parts)} of {', '.join(names)}; the adapter is not whole")
        if not parts:  # as it was made, adding nothing: a router has no bias there, and not all projections have LoRAs
            continue
        value = torch.cat(parts, dim=1 if kind == "lora_b" else 0)
        if value.shape != tensor.shape:
            raise UserError(f"{path}: {name} would be {tuple(value.shape)}, the base needs {tuple(tensor.shape)}")
        tensor.copy_(value)
    if left:
        raise UserError(
            f"{path}: this base has no place for {', '.join(sorted(left)[:4])}; give the adapter's own base"
        )
