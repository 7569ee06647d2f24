"""Models on disk: load a frozen base, write an adapter folder, read one back strictly.

An adapter folder holds ``adapter.safetensors`` (every LoRA and router tensor, fp32, by its full parameter name) and
``molora.json`` (the true base model, the shape of the injection, a checksum of the tensors and a fingerprint of the
base). A stage that starts from such a folder gets its routers too, however many stages came before.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file

from molora.config import Config, Injection, LoadPrecision, Model, MoE, check
from molora.errors import UserError
from molora.files import file_sha256
from molora.layers import LoraLinear, Router
from molora.patch import AnyModel, State, inject

WEIGHTS, MANIFEST, FORMAT = "adapter.safetensors", "molora.json", 1

# Injection keys that fix the shape or the meaning of saved tensors; the others may differ from stage to stage.
_SHAPE_KEYS = (
    "strategy", "num_experts", "top_k", "lora_r", "lora_alpha", "target_keywords", "start_layer", "num_layers",
    "stride", "layer_indices", "attn_lora",
)  # fmt: skip


def build(config: Config, place: torch.device | None = None) -> tuple[PreTrainedModel, Any]:
    """The model that training starts from: base, adapters, and the weights of the stage before if there was one.

    ``config.model_name`` names a base model or an adapter, a folder or on the hub. ``place`` is where the model is put,
    if that is not yet the device that it is for. Returns (model, tokenizer).

    Raises:
        UserError: nothing by that name, a backbone of another kind, or an adapter of another shape or base.
    """
    if config.model_name is None:
        raise UserError("model_name is missing: --set model_name=FOLDER (a model, or the final/ folder of a stage)")
    device = pick_device(config.device)
    folder = find_adapter(config.model_name)
    if folder is None:
        model, tokenizer = load_base(config.model_name, config.model, device, place)
        _check_backbone(config, model)
        return inject(model, config), tokenizer
    manifest = read_manifest(folder)
    _check_same_shape(folder, manifest, config)
    model, tokenizer = load_base(locate_base(folder, manifest), config.model, device, place)
    _check_backbone(config, model)
    inject(model, config)
    load_weights(model, folder)
    return model, _tokenizer(folder) or tokenizer


def load(name: str | Path, device: str = "auto", precision: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A base model, or the model of an adapter, in evaluation mode. Returns (model, tokenizer).

    Args:
        name: adapter folder (such as a stage's ``final``), model folder, or the hub name of an adapter or a model.
        device: ``auto`` (CUDA if there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:1``.
        precision: how the base is kept: ``auto`` (``bf16`` where the device is fast in it, else ``fp32``), ``fp32``,
            ``bf16``, ``fp16``, or by bitsandbytes ``int8`` or ``int4``.

    Raises:
        UserError: as :func:`build`; also for truncated or corrupt adapter files.
    """
    model_config = Model(load_precision=check(LoadPrecision, {"mode": precision}, where="precision"))
    folder = find_adapter(name)
    if folder is None:
        model, tokenizer = load_base(str(name), model_config, pick_device(device))
        return model.eval(), tokenizer
    manifest = read_manifest(folder)
    model, tokenizer = load_base(locate_base(folder, manifest), model_config, pick_device(device))
    return put_on(model, folder).eval(), _tokenizer(folder) or tokenizer


def put_on(model: AnyModel, folder: Path) -> AnyModel:
    """Patch a base model in place as the adapter folder says and load its tensors; raises as :func:`load_weights`."""
    manifest = read_manifest(folder)
    injection = check(Injection, manifest["injection"], where=str(folder))
    inject(model, injection, check(MoE, manifest["moe"], where=str(folder)))
    load_weights(model, folder)
    return model


# --- the frozen base ---------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; anything else is checked and taken as it is."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: {name!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":  # asked without touching one, which would take memory of it
        if not torch.cuda.is_available():
            raise UserError(f"device: {name!r} was asked for, but PyTorch sees no CUDA GPU; use device: auto or cpu")
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise UserError(f"device: {name!r} was asked for, and the GPUs here are cuda:0 to cuda:{count - 1}")
        return device
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # what each backend makes of not being there
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]  # what follows are names of all backends
        raise UserError(f"device: {name!r} cannot be used here ({reason}); use auto, cpu, cuda or cuda:N") from error
    return device


def load_base(
    name: str, config: Model, device: torch.device, place: torch.device | None = None
) -> tuple[PreTrainedModel, Any]:
    """A transformers causal LM in the configured precision for ``device``, and its tokenizer. ``place`` is where it is
    put, if that is not the device.

    Raises:
        UserError: nothing by that name, or a precision that is not to be had here.
    """
    gc.collect()  # a patched model that nobody uses any more refers to itself, and its memory may be wanted now
    if device.type == "cuda":
        torch.cuda.empty_cache()
    attention = config.attn_implementation
    kwargs: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    kwargs |= quantisation(config.load_precision, device)
    kwargs |= {"dtype": pick_dtype(config.load_precision, device), "use_safetensors": True, "output_loading_info": True}
    with _opening(name, config) as source:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        found: Any = AutoModelForCausalLM.from_pretrained(name, **source, **kwargs)
    model, info = found
    if missing := sorted(info["missing_keys"]):  # which transformers fills at random, and only says so
        raise UserError(
            f"{name!r}: its files lack weights that its config.json asks for "
            f"({_listed('missing', missing)}); get them again, whole"
        )
    model.config.use_cache = True
    model.molora_base = name  # type: ignore[assignment] # the name that save_adapter writes down
    if not getattr(model, "is_quantized", False):  # which is on its device already, and refuses to be moved
        model.to(place or device)  # type: ignore[arg-type] # transformers narrows the signature of Module.to
    return model, tokenizer


def describe_base(config: Config) -> tuple[PreTrainedConfig, Any]:
    """Shape and tokenizer of the base that :func:`build` would load, without its weights. Raises as :func:`build`."""
    if config.model_name is None:
        raise UserError("model_name is missing: --set model_name=FOLDER (a model, or the final/ folder of a stage)")
    folder, name = find_adapter(config.model_name), config.model_name
    if folder is not None:
        manifest = read_manifest(folder)
        _check_same_shape(folder, manifest, config)
        name = locate_base(folder, manifest)
    with _opening(name, config.model) as source:
        base = AutoConfig.from_pretrained(name, **source)
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    return base, (_tokenizer(folder) if folder is not None else None) or tokenizer


@contextmanager
def _opening(name: str, config: Model) -> Iterator[dict[str, Any]]:
    """What transformers is told about where a base comes from; its errors become one that the user can mend."""
    check_there(name)
    try:
        yield {"local_files_only": Path(name).is_dir(), "trust_remote_code": config.trust_remote_code}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files raise whatever the line that met them first does
        own = sorted(folder.name for folder in Path(name).glob("*") if is_adapter(folder))
        if own:
            last = "final" if "final" in own else own[-1]
            raise UserError(f"{name!r} is the folder of a run; give {str(Path(name) / last)!r}") from error
        if not isinstance(error.__cause__, LocalEntryNotFoundError) and _is_of_peft(name):  # the hub can be asked
            raise UserError(
                f"{name!r} is an adapter that PEFT saved; open it with PeftModel.from_pretrained(base, "
                f"{name!r}) or AutoPeftModelForCausalLM.from_pretrained({name!r}) of peft, after import molora.peft"
            ) from error
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, ImportError):
            raise UserError(
                f"{name!r}, as the keys under model ask for it (attn_implementation), needs a package that "
                f"is not here ({reason}); install it, or set model.attn_implementation=auto"
            ) from error
        raise UserError(
            f"{name!r} cannot be loaded as a causal language model ({reason}); give a folder with "
            "config.json, safetensors weights and tokenizer, or the name of a model on the Hugging Face hub"
        ) from error


def check_there(name: str) -> None:
    """Raise :class:`UserError` for what is neither a folder here nor written as a name on the hub."""
    if not Path(name).is_dir() and not _is_hub_name(name):
        raise UserError(f"no folder {name!r} here")


def _is_of_peft(name: str) -> bool:
    """Whether the folder or hub repository has an adapter that PEFT saved."""
    try:
        return find_adapter_config_file(name) is not None
    except OSError:  # no such repository
        return False


def quantisation(precision: LoadPrecision, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` is told of an int8 or int4 base; nothing for other precisions.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if precision.mode not in ("int8", "int4"):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.load_precision.mode: {precision.mode} needs bitsandbytes: pip install bitsandbytes")
    dtype = pick_dtype(precision, device)
    settings = BitsAndBytesConfig(
        load_in_8bit=precision.mode == "int8",
        load_in_4bit=precision.mode == "int4",
        bnb_4bit_quant_type=precision.quant_type,
        bnb_4bit_use_double_quant=precision.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def pick_dtype(precision: LoadPrecision, device: torch.device) -> torch.dtype:
    """The dtype that activations have: that of the base, or ``compute_dtype`` where the base is quantised; ``auto`` is
    bf16 where the device is fast in it, else fp32."""
    mode = precision.compute_dtype if precision.mode in ("int8", "int4") else precision.mode
    if mode == "auto":
        fast_bf16 = cuda_has_bf16(device) if device.type == "cuda" else cpu_has_fast_bf16()
        return torch.bfloat16 if fast_bf16 else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mode]


def cuda_has_bf16(device: torch.device) -> bool:
    """Whether this GPU multiplies bf16: PyTorch says so of those that emulate it too."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX or Arm's BF16); without it bf16 is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def _check_backbone(config: Config, model: nn.Module) -> None:
    kind = getattr(model.config, "model_type", None)
    if config.backbone is not None and config.backbone != kind:
        raise UserError(f"backbone: {config.backbone!r}, but {config.model_name!r} is a {kind!r} model")


def base_fingerprint(model: nn.Module) -> str | None:
    """Tells base models of one shape apart: a hash over the first elements of each frozen tensor, read as bf16, so
    that it is the same for a base loaded in fp32 and in bf16. None for fp16 and for quantised bases, whose rounding
    loses what it reads."""
    if (known := getattr(model, "molora_base_fingerprint", None)) is not None:
        return known  # taken before the base was spread over processes
    if any(p.dtype == torch.float16 or not p.is_floating_point() for p in model.parameters()):
        return None
    adapters = {id(p) for _, p in adapter_tensors(model)}
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            head = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(repr(tuple(parameter.shape)).encode() + bytes(head.numpy().tobytes()))
    return digest.hexdigest()


# --- adapter folders ---------------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` is (or claims to be) an adapter folder."""
    return (folder / MANIFEST).is_file() or (folder / WEIGHTS).is_file()


def find_adapter(name: str | Path) -> Path | None:
    """The folder of the adapter that ``name`` is: itself, or that of a hub repository with a manifest, which is fetched
    whole to the hub's cache. None for anything else, such as a base model.

    Raises:
        UserError: an adapter on the hub of which not every file can be had, or the hub cannot be asked and its cache
            has nothing by that name.
    """
    if is_adapter(Path(name)):
        return Path(name)
    name = str(name)
    if not _is_hub_name(name):
        return None
    try:
        hf_hub_download(name, MANIFEST)
    except LocalEntryNotFoundError as error:  # no network, which a base in the cache does without
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise UserError(
                f"{name!r} cannot be loaded: it is neither a folder nor in the hub's cache here, and the Hugging Face "
                f"hub cannot be asked for it ({reason}); try again with a network and without HF_HUB_OFFLINE, or give "
                "a folder"
            ) from error
        return None
    except (OSError, ValueError):  # no such file, repository or name: opened as a base it says which
        return None
    try:
        return Path(snapshot_download(name))
    except Exception as error:  # transport errors have no common base across versions of the hub's client
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: the Hugging Face hub has this adapter, but its files cannot be had ({reason}); try again with a "
            "network and without HF_HUB_OFFLINE, or give a folder that has them"
        ) from error


def _is_hub_name(name: str) -> bool:
    """Whether the hub is asked for it: it is not written as a path, and nothing here has that name."""
    return bool(name) and not name.startswith((".", "/", "~")) and name.count("/") <= 1 and not Path(name).exists()


def save_adapter(model: nn.Module, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write the model's LoRA and router tensors and their manifest to ``folder``, which is created.

    ``state_dict`` holds the tensors where the model's own are sharded; by default the model's own are written.

    Both files are written aside and flushed to disk before either takes its place, the manifest last: a folder with a
    manifest is whole.

    Raises:
        ValueError: the model has no adapters, or no name or folder to find its base by, or ``state_dict`` lacks some.
        OSError: the disk is full or not writable; older files are untouched.
    """
    state = _state(model)
    base = base_name(model)
    if not base:
        raise ValueError(
            "the model was made in memory, so its adapter could never be loaded: save the base with save_pretrained "
            "and load it before molora.inject, or set model.molora_base to its folder or hub name"
        )
    folder = Path(folder)
    own = adapter_tensors(model)
    if any(".molora_adapters." in name for name, _ in own):
        raise ValueError("the model's adapters are PEFT's: save them by the PEFT model's own save_pretrained")
    if state_dict is not None:
        if missing := [name for name, _ in own if name not in state_dict]:
            raise ValueError(
                f"state_dict lacks tensors of the adapter ({_listed('missing', missing)}); give one with the names of "
                "model.state_dict()"
            )
        own = [(name, state_dict[name]) for name, _ in own]
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in own}
    folder.mkdir(parents=True, exist_ok=True)
    asides = [folder / (name + ".tmp") for name in (WEIGHTS, MANIFEST)]
    try:
        _write_aside(asides, tensors, base, model, state)
        for aside in asides:
            os.replace(aside, aside.with_suffix(""))
    except BaseException:
        for aside in asides:
            aside.unlink(missing_ok=True)
        raise
    return folder


def _write_aside(
    asides: list[Path], tensors: dict[str, torch.Tensor], base: str, model: nn.Module, state: State
) -> None:
    weights, manifest_file = asides
    save_file(tensors, weights, metadata={"format": "pt"})
    manifest = {
        "format": FORMAT,
        "base_model": base,
        "base_fingerprint": base_fingerprint(model),
        "injection": state.injection.model_dump(),
        "moe": state.moe.model_dump(),
        "routers": state.ledger.names,
        "sha256": file_sha256(weights),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    manifest_file.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for aside in asides:
        with aside.open("rb") as file:
            os.fsync(file.fileno())


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load an adapter folder into a model that has the same adapters, strictly: every tensor used, every one found.

    Raises:
        UserError: missing, truncated or altered files; tensors missing, left over or of another shape; another base.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: missing; the folder is incomplete, use another checkpoint")
    if file_sha256(path) != manifest["sha256"]:
        raise UserError(f"{path}: its checksum differs from {MANIFEST}'s: truncated or altered; use another checkpoint")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); use another checkpoint") from error
    fingerprint = base_fingerprint(model)
    if None not in (fingerprint, manifest.get("base_fingerprint")) and manifest["base_fingerprint"] != fingerprint:
        raise UserError(
            f"{folder}: the adapter was trained on another base model than the one loaded "
            f"({manifest['base_model']!r} when it was saved); load it on its own base"
        )
    own = dict(adapter_tensors(model))
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if missing or extra or shapes:
        raise UserError(
            f"{path} does not fit the model: "
            + "; ".join(
                filter(
                    None, [_listed("missing", missing), _listed("not in the model", extra), _listed("shapes", shapes)]
                )
            )
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def read_manifest(folder: Path) -> dict[str, Any]:
    """``molora.json`` as a mapping with the keys that this version needs; :class:`UserError` otherwise."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or not readable ({error}); the folder is no whole adapter folder") from error
    needed = {"format": int, "base_model": str, "injection": dict, "moe": dict, "sha256": str}
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), kind) for key, kind in needed.items()):
        told = ", ".join(f"{key} ({kind.__name__})" for key, kind in needed.items())
        raise UserError(f"{path}: not an adapter manifest; it needs the keys {told}")
    if manifest["format"] != FORMAT:
        raise UserError(f"{path}: written in format {manifest['format']}; this version of molora reads {FORMAT}")
    return manifest


def _check_same_shape(folder: Path, manifest: dict[str, Any], config: Config) -> None:
    saved, wanted = manifest["injection"], config.injection.model_dump()
    differ = [
        f"{key} is {saved.get(key)!r} there, {wanted[key]!r} here"
        for key in _SHAPE_KEYS
        if saved.get(key) != wanted[key]
    ]
    there, here = check(MoE, manifest["moe"], where=str(folder)), config.moe
    for key in ("router_scope", "expert_scope"):
        if (was := getattr(there, key)) != (wanted := getattr(here, key)):
            differ.append(f"moe.{key} is {was!r} there, {wanted!r} here")
    if (there.load_balance.type == "aux_loss_free") != (here.load_balance.type == "aux_loss_free"):
        differ.append(
            f"moe.load_balance.type is {there.load_balance.type!r} there, {here.load_balance.type!r} here, and only "
            "aux_loss_free has a selection bias"
        )
    if differ:
        raise UserError(f"{folder}: its adapter has another shape than this configuration: " + "; ".join(differ))


def adapter_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every adapter parameter and router buffer by full name."""
    tensors: dict[str, torch.Tensor] = {}
    model = getattr(model, "_orig_mod", model)  # what torch.compile made its wrapper of
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear | Router):
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            tensors.update((f"{path}.{name}", tensor) for name, tensor in own)
    return list(tensors.items())


def _state(model: nn.Module) -> State:
    state = getattr(model, "molora", None)
    if not isinstance(state, State):
        raise ValueError("the model has no molora adapters; call molora.inject(model, config) first")
    return state


def base_name(model: nn.Module) -> str:
    """The base as given; a local folder as an absolute path, so that the adapter loads from any working folder."""
    name = getattr(model, "molora_base", None) or getattr(model.config, "_name_or_path", "")
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def locate_base(folder: Path, manifest: dict[str, Any]) -> str:
    """The folder or hub name of an adapter's base. Raises :class:`UserError` for a folder that is gone."""
    name = manifest["base_model"]
    if name.startswith("./"):  # the adapter folder brings its base
        name = str((folder / name).resolve())
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(
            f"{folder / MANIFEST}: its base model {name!r} is gone; put it back or edit base_model to where it is now, "
            "a folder or a hub name"
        )
    return name


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:  # no code of the folder is run for it, nor asked about: an exported model's own is only for the model
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as in _opening
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder / 'tokenizer.json'}: cannot be read ({reason}); use another checkpoint") from error


def _listed(label: str, items: list[str], most: int = 4) -> str:
    if not items:
        return ""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{label}: {', '.join(items[:most])}{more}"
