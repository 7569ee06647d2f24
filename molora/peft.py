"""molora as a PEFT method. Importing this module registers it; nothing else in molora imports PEFT.

    import molora.peft
    model = peft.get_peft_model(model, molora.peft.MoloraConfig(injection={"num_experts": 4, "top_k": 2}))

The tuner patches nothing by itself. For every adapter it has :func:`molora.inject` build its layers, and puts one
:class:`MoloraLayer` in each place that was patched, which runs the original or the layers of the active adapter.
Saved tensors have the names of molora's own ``adapter.safetensors``, after PEFT's ``base_model.model.``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import ModelCard
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn

from molora import hooks
from molora.adapter import adapter_tensors
from molora.config import Injection, MoE, check
from molora.errors import UserError
from molora.patch import State, inject

_NAME = "molora"
_ON_CARD = """Routed LoRA experts of `molora`. Install it (`pip install molora[peft]`) and import `molora.peft` before
PEFT opens the adapter; without it PEFT ends with `KeyError: 'MOLORA'`.

```python
import molora.peft
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY")
```

"""


def _register() -> None:
    # PEFT registers methods by a member of its enumeration of them, which has no public way to grow.
    member = str.__new__(PeftType, _NAME.upper())
    member._name_ = member._value_ = _NAME.upper()
    setattr(PeftType, member._name_, member)
    PeftType._member_names_.append(member._name_)
    PeftType._member_map_[member._name_] = PeftType._value2member_map_[member._value_] = member
    register_peft_method(name=_NAME, config_cls=MoloraConfig, model_cls=MoloraModel)


@dataclass
class MoloraConfig(PeftConfig):
    """What ``adapter_config.json`` holds. Keys, defaults and checks of both sections are those of
    :class:`molora.Injection` and :class:`molora.MoE`; wrong ones raise :class:`molora.UserError`."""

    injection: dict[str, Any] = field(default_factory=dict)
    """Where adapters go and what shape they have: ``num_experts``, ``top_k``, ``lora_r``, ``target_keywords``, …"""
    moe: dict[str, Any] = field(default_factory=dict)
    """Routers and their losses: ``router_z_loss_coef``, ``load_balance``, …"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[_NAME.upper()]
        self.task_type = self.task_type or "CAUSAL_LM"
        self.injection = check(Injection, self.injection, where="injection").model_dump()
        self.moe = check(MoE, self.moe, where="moe").model_dump()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """What PEFT writes, and on the model card that it has just written how to open the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        # An adapter with a name of its own lies in a folder below the card.
        path = next((p for p in (folder / "README.md", folder.parent / "README.md") if p.is_file()), None)
        if path is None:
            return
        card: Any = ModelCard.load(path, ignore_metadata_errors=True)
        if card.data.library_name == "peft" and "import molora.peft" not in card.text:
            card.text = f"\n{_ON_CARD}{card.text.lstrip()}"
            card.save(path)


class MoloraLayer(nn.Module, BaseTunerLayer):
    """A linear or an MLP of the model, and what each adapter has in its place."""

    adapter_layer_names = ("molora_adapters",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.molora_adapters = nn.ModuleDict()
        self.register_load_state_dict_post_hook(_base_is_not_missing)

    def forward(self, x: Tensor) -> Tensor:
        active = next((name for name in self.active_adapters if name in self.molora_adapters), None)
        if self.disable_adapters or active is None:
            return self.base_layer(x)
        return self.molora_adapters[active](x)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Run this adapter, and have it train unless ``inference_mode``; the base inside it stays frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, layers in self.molora_adapters.items():
            for _, tensor in adapter_tensors(layers):
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(name in names and not inference_mode)
        self._active_adapter = names


def _base_is_not_missing(_: nn.Module, incompatible: Any) -> None:
    """An adapter's file has no base weights, of which PEFT would warn for each of the adapter's layers."""
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not _of_base(key)]


def _of_base(name: str) -> bool:
    """Whether this is the name of a base weight within an adapter's layers."""
    return "base" in name.partition(".molora_adapters.")[2].split(".")


class MoloraModel(BaseTuner):
    """The tuner. One adapter is active at a time: two sets of routers have no common meaning."""

    prefix = f"{_NAME}_"
    tuner_layer_cls = MoloraLayer
    uses_shared_state = True  # the ledger of an adapter's routers, which only the tuner changes with the adapter

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.states: dict[str, State] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *_: Any, **__: Any) -> None:
        """Patch ``model``, out of which other adapters are taken for the time, and keep the layers made."""
        config: Any = self.peft_config[adapter_name]
        sites = {(id(parent), attribute): (parent, attribute, layer) for parent, attribute, layer in self._sites()}
        before: Any = getattr(model, "molora", None)
        self._deactivate()
        for parent, name, layer in sites.values():
            setattr(parent, name, layer.base_layer)
        try:
            inject(model, {"injection": config.injection, "moe": config.moe})
            state: Any = model.molora
            self.states[adapter_name] = state
            self._deactivate()
            for parent, name, original in state.replaced:
                site = sites.setdefault((id(parent), name), (parent, name, MoloraLayer(original)))
                site[2].molora_adapters[adapter_name] = parent.get_submodule(name)
        except UserError:
            if before is not None:
                hooks.attach(model, before)
            raise
        finally:
            for parent, name, layer in sites.values():
                setattr(parent, name, layer)
        self.targeted_module_names = [path for path, module in model.named_modules() if isinstance(module, MoloraLayer)]
        (active,) = self.active_adapters
        self.set_adapter(active, self.peft_config[active].inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one. Raises :class:`UserError` for several."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) != 1:
            raise UserError(f"one molora adapter is active at a time, not {names}; give one name")
        super().set_adapter(names[0], inference_mode)
        self._deactivate()
        hooks.attach(self.model, self.states[names[0]])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, another becomes active. Raises ValueError for an unknown one."""
        super().delete_adapter(adapter_name)
        del self.states[adapter_name]
        self._deactivate()
        for name in self.active_adapters:
            hooks.attach(self.model, self.states[name])

    def _sites(self) -> list[tuple[nn.Module, str, MoloraLayer]]:
        """(parent, attribute, layer)"""
        return [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent.named_children()
            if isinstance(child, MoloraLayer)
        ]

    def _deactivate(self) -> None:
        state = getattr(self.model, "molora", None)
        if state is not None:
            hooks.detach(self.model, state)

    def _unload_and_optionally_merge(self, merge: bool = True, *_: Any, **__: Any) -> nn.Module:
        if merge:
            raise UserError("routed experts have no single weight to merge; see python -m molora.convert merge --help")
        self._deactivate()
        for parent, name, layer in self._sites():
            setattr(parent, name, layer.base_layer)
        return self.model

    def _create_and_replace(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("inject_adapter patches the whole model at once")

    # PEFT's names of saved tensors, from those in the model and back.

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *_: Any, **__: Any
    ) -> dict[str, Tensor]:
        marker = f".molora_adapters.{adapter_name}."
        return {name: tensor for name, tensor in state_dict.items() if marker in name and not _of_base(name)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".molora_adapters.{adapter_name}.", ".").replace(".base_layer.", ".")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own = cls._get_adapter_state_dict(model, config, adapter_name, model.state_dict())
        wanted = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in own}
        if wanted.keys() != state_dict.keys():
            differ = sorted(wanted.keys() ^ state_dict.keys())
            raise UserError(
                f"the saved adapter does not fit its adapter_config.json: {len(differ)} tensors are missing or left "
                f"over, such as {differ[0]}; use another checkpoint"
            )
        return {wanted[key]: tensor for key, tensor in state_dict.items()}


_register()
