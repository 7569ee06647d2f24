"""Adapters that EulerForge trained with ``mixture_lora``, read as molora's.

EulerForge saves whole models. A wrapped linear is ``base_layer.weight``; beside it are ``router.weight``,
``router.bias`` and ``experts.N.loraA``, ``experts.N.loraB`` on the MLP, and ``lora_A``, ``lora_B`` on attention. The
arithmetic is molora's, but for ``top_k: 1``, whose only gate is 1 there and the router's probability here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from molora.adapter import adapter_tensors
from molora.config import Injection, check
from molora.errors import UserError
from molora.patch import inject

_WRAPPED = re.compile(r"(.+)\.(?:router\.(?:weight|bias)|experts\.\d+\.lora[AB]|lora_[AB])")


def put_on(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Patch ``model``, the base that the run started from, in place with the adapter of a checkpoint folder
    (``final``, ``checkpoint-best``).

    Raises:
        UserError: files missing or not EulerForge's, another strategy than ``mixture_lora``, ``top_k: 1``, another
            base, or a base whose own weights were trained along, which an adapter cannot hold.
    """
    saved, injection = _read_tensors(folder), _read_injection(folder)
    names = [match[1] for match in map(_WRAPPED.fullmatch, saved) if match]
    layers = {
        int(number) for name in names if (number := _layer(name)) is not None and f"{name}.router.weight" in saved
    }
    routed = sorted({_last(name) for name in names if f"{name}.router.weight" in saved})
    plain = sorted({_last(name) for name in names if f"{name}.lora_A" in saved})
    if not routed:
        raise UserError(f"{folder}: no routers (…router.weight) in its tensors; only mixture_lora runs can be imported")
    one = next(name for name in names if f"{name}.router.weight" in saved)
    if f"{one}.experts.0.loraA" not in saved:
        raise UserError(f"{folder}: {one}.experts.0.loraA is missing from its tensors; the checkpoint is not whole")
    shape = {
        "num_experts": len(saved[f"{one}.router.weight"]),
        "top_k": injection["top_k"],
        "lora_r": len(saved[f"{one}.experts.0.loraA"]),
        "lora_alpha": float(injection["lora_alpha"]),
        "target_keywords": routed,
        "layer_indices": sorted(layers),
        "attn_lora": {"enabled": bool(plain), "keywords": plain or ["q_proj"]},
    }
    if shape["top_k"] == 1:
        raise UserError(
            f"{folder}: top_k is 1; EulerForge then weighs the expert by 1, molora by its probability, so no router of "
            "molora's gives the same model; a run with top_k of 2 or more can be imported"
        )
    inject(model, check(Injection, shape, where=str(folder)))
    _load(model, saved, folder)
    return model


@torch.no_grad()
def _load(model: PreTrainedModel, saved: Mapping[str, Tensor], folder: Path) -> None:
    used: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in saved:
            raise UserError(f"{folder}: {name} is missing; the checkpoint does not fit this base, or is incomplete")
        used.add(name)
        return saved[name].float()

    for name, tensor in adapter_tensors(model):
        path, _, kind = name.rpartition(".")
        if path.endswith(".router"):
            value = take(name)
        else:
            projection: Any = model.get_submodule(path)
            single, of_expert = f"lora_{kind[-1].upper()}", f"lora{kind[-1].upper()}"
            routed = f"{path}.router.weight" in saved
            parts = (
                [take(f"{path}.experts.{e}.{of_expert}") for e in range(projection.experts)]
                if routed
                else [take(f"{path}.{single}")]
            )
            value = torch.cat(parts, dim=0 if kind == "lora_a" else 1)
        if value.shape != tensor.shape:
            raise UserError(f"{folder}: {name} would be {tuple(value.shape)}, the base needs {tuple(tensor.shape)}")
        tensor.copy_(value)

    own = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in saved.items():
        if name in used:
            continue
        base = own.get(name.replace(".base_layer.", "."))
        if base is None or base.shape != tensor.shape or not torch.equal(base.to(tensor.dtype), tensor.to(base.device)):
            raise UserError(
                f"{folder}: {name} differs from the base given, so this is another base or one that was trained along; "
                "give the model that the run started from, in the precision that it was loaded in"
            )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    whole, old = folder / "model.safetensors", folder / "pytorch_model.bin"
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
        if whole.is_file():
            return load_file(whole)
        if old.is_file():
            return torch.load(old, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: its weights cannot be read ({' '.join(str(error).split())[:200]})") from error
    raise UserError(f"{folder}: neither {whole.name} nor {old.name}; give a checkpoint folder, such as final/")


def _read_injection(folder: Path) -> dict[str, Any]:
    """The run's ``injection`` section, which lies beside the checkpoint folder."""
    path = folder.absolute().parent / "resolved_config.json"
    try:
        injection = json.loads(path.read_text(encoding="utf-8"))["injection"]
        if injection["strategy"] != "mixture_lora":
            raise UserError(f"{path}: strategy is {injection['strategy']}; only mixture_lora can be imported")
        return {"top_k": int(injection.get("top_k", 2)), "lora_alpha": injection.get("lora_alpha", 32.0)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: needed for top_k and lora_alpha, and not readable ({error})") from error


def _layer(name: str) -> str | None:
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]
