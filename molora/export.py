"""A folder that ``AutoModelForCausalLM.from_pretrained`` opens, with base, experts and routers in it.

transformers has no class for a patched model, so the folder brings one, in a file of a single import that needs molora
installed: opening takes ``trust_remote_code=True``, and without it transformers refuses rather than load less than
what was saved. A folder that needs nothing is what :mod:`molora.merge` makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from molora.adapter import MANIFEST, put_on, read_manifest, save_adapter
from molora.errors import UserError
from molora.patch import remove

_BASE = "./base"  # where the base is in the folder, as molora.json names it
_CODE = "from molora.export import MoloraConfig, MoloraForCausalLM  # noqa: F401 # needs: pip install molora\n"


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write the patched ``model`` whole: its base in its own dtype, the adapter in fp32, the tokenizer.

    The adapter is taken out of ``model``, which is its base afterwards.
    """
    save_adapter(model, folder)
    manifest = read_manifest(folder) | {"base_model": _BASE}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    # Weights that were read quantised cannot be turned back into an older layout, and need not be.
    as_read = getattr(model, "is_quantized", False)
    remove(model).save_pretrained(folder / _BASE, save_original_format=not as_read)
    for place in (folder, folder / _BASE):
        tokenizer.save_pretrained(place)
    (folder / "modeling_molora.py").write_text(_CODE, encoding="utf-8")
    classes = {"AutoConfig": MoloraConfig, "AutoModelForCausalLM": MoloraForCausalLM}
    config = {
        "model_type": MoloraConfig.model_type,
        "architectures": [MoloraForCausalLM.__name__],
        "auto_map": {auto: f"modeling_molora.{its.__name__}" for auto, its in classes.items()},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class MoloraConfig(PreTrainedConfig):
    """Names the kind of folder; the model's own configuration is that of the base in it."""

    model_type = "molora"


class MoloraForCausalLM:
    """What ``AutoModelForCausalLM`` finds in the folder: a loader, for the model keeps the class of its base."""

    config_class = MoloraConfig

    @classmethod
    def from_pretrained(cls, name: str | Path, *_: Any, config: MoloraConfig | None = None, **options: Any) -> Any:
        """The patched model of a folder or hub repository that :func:`save` wrote, in evaluation mode.

        ``options`` are those of the base's own ``from_pretrained``; with ``output_loading_info`` it returns (model,
        information about the base). Raises :class:`UserError` for damaged files.
        """
        hub = {
            key: options.pop(key) for key in ("revision", "token", "cache_dir", "local_files_only") if key in options
        }
        for of_this_file in ("trust_remote_code", "code_revision", "_commit_hash", "_from_auto", "adapter_kwargs"):
            options.pop(of_this_file, None)
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name), **hub))
        options = _set_on(config, folder) | options
        base = folder / read_manifest(folder)["base_model"]
        found: Any = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **options)
        model, *info = found if options.get("output_loading_info") else (found,)
        put_on(model, folder).eval()
        return (model, *info) if info else model

    @classmethod
    def _from_config(cls, config: MoloraConfig, **_: Any) -> NoReturn:
        """What ``AutoModelForCausalLM.from_config`` calls, to refuse it."""
        folder = config.name_or_path or "an exported folder"
        raise UserError(
            f"from_config: the configuration of {folder} has no shape to make random weights of; open the folder with "
            "from_pretrained, or give from_config the configuration of the folder 'base' in it, and what that makes to "
            "molora.inject"
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Called by transformers when it loads the class from the folder; the folder says all there is to register."""


def _set_on(config: MoloraConfig | None, folder: Path) -> dict[str, Any]:
    """Options for the base that ``AutoModelForCausalLM``, or the user, put into ``config``: what differs in it from the
    folder's."""
    if config is None:
        return {}
    own = MoloraConfig.from_pretrained(folder).to_diff_dict()
    options = {key: value for key, value in config.to_diff_dict().items() if own.get(key) != value}
    if config._attn_implementation:  # which is in no dictionary of a configuration
        options["attn_implementation"] = config._attn_implementation
    return options
