"""Put adapters into a model and take them out again: in place, per instance, reversible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from molora import hooks
from molora.config import Config, Group, Injection, MoE, check
from molora.errors import UserError
from molora.families import Family, family_of
from molora.layers import ExpertMLPs, LoraLinear, LoraMLP, Router, SharedInput, has_hooks, is_dense
from molora.routing import Ledger

AnyModel = TypeVar("AnyModel", bound=nn.Module)
MOST_GRAPHS = 64
"""Of one compiled function: for each kind of layer two to four in training (first or not, lengths fixed or free), and
evaluation's."""


@dataclass
class State:
    """What :func:`inject` did to a model; lives at ``model.molora``."""

    injection: Injection
    moe: MoE
    ledger: Ledger = field(default_factory=Ledger)
    routers: list[Router] = field(default_factory=list)
    """In the order of the ledger's rows."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    """(parent, attribute, original module)"""
    unfrozen: list[str] = field(default_factory=list)
    """Names of base parameters that required grad before; the parameters themselves would be held here whole when the
    model is spread over processes."""
    hooks: list[RemovableHandle] = field(default_factory=list)
    """Of :mod:`molora.hooks`."""


def inject(
    model: AnyModel, config: Config | Injection | Mapping[str, Any], moe: MoE | Mapping[str, Any] | None = None
) -> AnyModel:
    """Freeze ``model`` and put adapters on its projections, in place.

    Args:
        model: a transformers causal LM; for its architecture see :func:`molora.families.family_of`.
        config: a whole configuration, its ``injection`` section, or a mapping with the keys of either.
        moe: the router settings where ``config`` does not hold them, as an :class:`MoE` or a mapping with its keys.

    Returns:
        ``model``. With ``init_b_std = 0`` its logits are those from before: bit for bit in small calls on a CPU,
        elsewhere but for rounding (the SwiGLU block rounds to 16 bits once where transformers does so twice). While it
        trains, ``outputs.loss`` has the router losses in it and ``outputs.aux_loss`` has them apart
        (:mod:`molora.hooks`); ``save_pretrained`` writes the adapter alone.

    Raises:
        UserError: an architecture without plain decoder layers, or with experts of its own that the keywords may mean,
            a keyword that matches no projection, a layer index out of range, a router scope that the targets do not
            allow, or a model that has adapters already.
    """
    injection, moe = _sections(config, moe)
    if hasattr(model, "molora"):
        raise UserError("the model has molora adapters already; call molora.remove(model) first")
    family = family_of(model)
    try:
        layers = model.get_submodule(family.layers)
    except AttributeError:
        raise UserError(
            f"{type(model).__name__} has no {family.layers}; give the causal LM, not its backbone"
        ) from None
    indices = _layer_indices(injection, len(layers))  # type: ignore[arg-type] # a ModuleList
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    _require_one_device(linears)
    fused = (
        getattr(model.config, "hidden_act", None) == "silu"
        and all(is_dense(linear) for linear in linears)
        and not any(has_hooks(module) for path, module in layers.named_modules() if path.endswith(f".{family.mlp}"))
    )
    _refuse_own_experts(model, layers, injection)
    plan = {i: _plan(family, layers.get_submodule(str(i)), injection, moe, fused) for i in indices}
    _require_matches(injection, family, plan, layers.get_submodule(str(indices[0])))

    state = State(injection, moe)
    state.ledger.experts, state.ledger.top_k = injection.num_experts, injection.top_k
    state.ledger.selection_bias = moe.load_balance.type == "aux_loss_free"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state.unfrozen.append(name)
            parameter.requires_grad_(False)
    for i in indices:
        _patch_layer(state, family, f"{family.layers}.{i}", layers.get_submodule(str(i)), plan[i], fused)
    hooks.attach(model, state)
    hooks.save_adapter_alone(model)
    return model


def remove(model: AnyModel) -> AnyModel:
    """Take the adapters out, in place: the original modules come back, frozen parameters are as they were before.

    Raises:
        ValueError: the model has no adapters.
    """
    state = getattr(model, "molora", None)
    if not isinstance(state, State):
        raise ValueError("the model has no molora adapters to remove")
    for parent, name, original in reversed(state.replaced):
        original.train(parent.training)
        setattr(parent, name, original)
    for name in state.unfrozen:
        model.get_parameter(name).requires_grad_(True)
    hooks.detach(model, state)
    return model


def parameter_groups(model: nn.Module) -> dict[Group, list[tuple[str, nn.Parameter]]]:
    """Adapter parameters by the group names that phases use, each with its full name, in model order.

    PyTorch's optimizers take them as they are, names too; a group may have options of its own, such as ``lr``:
    ``AdamW([{"params": members} for members in parameter_groups(model).values() if members], lr=1e-4)``. For one that
    takes no names: ``[p for members in parameter_groups(model).values() for _, p in members]``.

    Raises:
        ValueError: the model has no adapters.
    """
    groups: dict[Group, list[tuple[str, nn.Parameter]]] = {"router": [], "lora": [], "attn_lora": []}
    for path, module in model.named_modules():
        if isinstance(module, Router):
            groups["router"] += [(f"{path}.{name}", p) for name, p in module.named_parameters(recurse=False)]
        elif isinstance(module, LoraLinear):
            groups[module.group] += [(f"{path}.{name}", p) for name, p in module.named_parameters(recurse=False)]
    if not any(groups.values()):
        raise ValueError("the model has no molora adapters; call molora.inject(model, config) first")
    return groups


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile each decoder layer with ``torch.compile``, in place; patched or not, in any mode.

    A layer is one graph, adapters and routers included. Where activations are recomputed in backward, attention and MLP
    are a graph each: the recomputing stays outside of them, since it runs what it holds twice, records included.

    Args:
        model: as for :func:`inject`. Activation checkpointing, if wanted, is on already.
        options: for ``torch.compile``, such as ``mode`` or ``fullgraph``.
    """
    # A layer's rows of the record are integers on its modules: as constants they would make every layer a graph of its
    # own. Dynamo leaves what comes after its eighth graph to eager, which two kinds of layers with evaluation reach.
    # Neither can be set for a part of a process.
    dynamo = torch._dynamo.config
    dynamo.allow_unspec_int_on_nn_module = True
    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
    family = family_of(model)
    for layer in model.get_submodule(family.layers).children():
        recomputed = getattr(layer, "gradient_checkpointing", False)
        parts = [child for _, child in layer.named_children()] if recomputed else [layer]
        for part in parts:
            part.compile(**options)


# --- planning ----------------------------------------------------------------------------------------------------

Plan = dict[str, Group]
"""Projection path within the layer -> the parameter group of its adapter."""


def _sections(
    config: Config | Injection | Mapping[str, Any], moe: MoE | Mapping[str, Any] | None
) -> tuple[Injection, MoE]:
    if moe is not None and not isinstance(moe, MoE):
        moe = check(MoE, moe, where="moe")
    if isinstance(config, Config):
        return config.injection, moe or config.moe
    if isinstance(config, Injection):
        return config, moe or MoE()
    if isinstance(config, Mapping) and ("injection" in config or "moe" in config):
        whole = check(Config, config)
        return whole.injection, moe or whole.moe
    return check(Injection, config, where="injection"), moe or MoE()


def _layer_indices(injection: Injection, count: int) -> list[int]:
    if injection.layer_indices is not None:
        indices = sorted(set(injection.layer_indices))
    else:
        stop = injection.start_layer + injection.num_layers if injection.num_layers else count
        indices = list(range(injection.start_layer, stop, injection.stride))
    if not indices or indices[-1] >= count:
        raise UserError(
            f"injection names decoder layers {indices or 'none'}; this model has {count}, numbered from 0: "
            "check start_layer, num_layers, stride and layer_indices"
        )
    return indices


def _plan(family: Family, layer: nn.Module, injection: Injection, moe: MoE, fused: bool) -> Plan:
    plan: Plan = {}
    targets, attention = family.names(injection.target_keywords), family.names(injection.attn_lora.keywords)
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if _matches(path, targets):
            plan[path] = "lora"
        elif injection.attn_lora.enabled and path.startswith(family.attention) and _matches(path, attention):
            plan[path] = "attn_lora"
    mlp = [f"{family.mlp}.{name}" for name in family.swiglu or ()]
    if injection.strategy == "mixture_lora" and moe.router_scope == "mlp":
        if not fused or not mlp:
            raise UserError(
                "moe.router_scope: mlp shares one router over the three projections of a SwiGLU MLP (hidden_act silu), "
                "which this architecture does not have, or which is quantised or has hooks; leave it at projection"
            )
        if {path for path, group in plan.items() if group == "lora"} != set(mlp):
            raise UserError(
                "moe.router_scope: mlp shares one router over the three projections of the MLP, so "
                f"injection.target_keywords must be exactly {list(family.swiglu or ())}"
            )
    return plan


def _require_one_device(linears: list[nn.Linear]) -> None:
    """accelerate brings an offloaded weight in when its linear is called, and takes it out again; the kernels read it
    without the linear."""
    if any(hasattr(linear, "_hf_hook") and linear.weight.is_meta for linear in linears):
        raise UserError(
            "the base is offloaded to CPU or disk (device_map, cpu_offload), and the kernels read its weights where "
            "they are: load it on one device, in 4 or 8 bits if it does not fit there"
        )
    devices = {str(linear.weight.device) for linear in linears}
    if len(devices) > 1:
        raise UserError(
            f"the base lies on several devices ({', '.join(sorted(devices))}; device_map), and the routers' losses are "
            "computed on one: load it on one, in 4 or 8 bits if it does not fit there, or train with "
            "training.parallel=fsdp"
        )


def _refuse_own_experts(model: nn.Module, layers: nn.Module, injection: Injection) -> None:
    """A mixture holds its own experts stacked in one tensor, where no adapter goes. A bare ``gate_proj`` would then
    match the expert that all tokens share, or nothing, and is refused; a path within the layer is taken at its word."""
    stacked = [path for path, p in layers.named_parameters() if p.ndim == 3 and "experts" in path.split(".")]
    bare = [keyword for keyword in injection.target_keywords if "." not in keyword]
    if stacked and bare:
        index, _, name = stacked[0].partition(".")
        layer = layers.get_submodule(index)
        linears = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
        raise UserError(
            f"{type(model).__name__} has experts already, stacked in {name}, where molora puts no adapters: take a "
            f"dense model, or give injection.target_keywords as paths, such as self_attn.o_proj ({bare} are not); the "
            f"linears of layer {index} are {linears}"
        )


def _matches(path: str, keywords: list[str]) -> bool:
    return any(path == keyword or path.endswith(f".{keyword}") for keyword in keywords)


def _require_matches(injection: Injection, family: Family, plans: dict[int, Plan], layer: nn.Module) -> None:
    planned = {path for plan in plans.values() for path in plan}
    linears = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
    wanted = [("injection.target_keywords", injection.target_keywords, "")]
    if injection.attn_lora.enabled:
        wanted.append(("injection.attn_lora.keywords", injection.attn_lora.keywords, family.attention))
    for key, keywords, within in wanted:
        for keyword in family.names(keywords):
            if not any(path.startswith(within) and _matches(path, [keyword]) for path in planned):
                here = [path for path in linears if path.startswith(within)]
                raise UserError(f"{key}: {keyword!r} matches no projection; a layer of this model has {here}")


# --- patching ----------------------------------------------------------------------------------------------------


def _patch_layer(state: State, family: Family, layer_path: str, layer: nn.Module, plan: Plan, fused: bool) -> None:
    made = {path: _make(state, layer.get_submodule(path), group) for path, group in plan.items()}
    block = tuple(f"{family.mlp}.{name}" for name in family.swiglu or ())
    if fused and block and all(plan.get(path) == "lora" for path in block):
        _patch_mlp(state, family, layer_path, layer, [made.pop(path) for path in block])

    for path, module in made.items():
        parent_path, _, name = path.rpartition(".")
        parent = layer.get_submodule(parent_path)
        state.replaced.append((parent, name, module.base))
        module.train(module.base.training)
        setattr(parent, name, module)
    for paths in _sharing(family, {path: plan[path] for path in made}):
        _share(state, layer_path, paths, [made[path] for path in paths])


def _sharing(family: Family, plan: Plan) -> Iterator[list[str]]:
    """The plan's projections, those that read one input and are of one kind together, each exactly once."""
    left = dict(plan)
    for paths in (*family.shared_inputs, *((path,) for path in plan)):
        for kind in ("lora", "attn_lora"):
            together = [path for path in paths if left.get(path) == kind]
            if together:
                yield together
            for path in together:
                del left[path]


def _make(state: State, base: nn.Module, group: Group) -> LoraLinear:
    assert isinstance(base, nn.Linear)
    config, moe = state.injection, state.moe
    routed = group == "lora" and config.strategy == "mixture_lora"
    router = None
    if routed and moe.router_scope == "projection":
        router = _router(state, base)
    return LoraLinear(
        base,
        group=group,
        experts=config.num_experts if routed else 1,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        init_b_std=config.init_b_std,
        router=router,
    )


def _router(state: State, reads_like: nn.Linear) -> Router:
    device: torch.device = reads_like.weight.device
    selection_bias = state.moe.load_balance.type == "aux_loss_free"
    return Router(reads_like.in_features, state.injection.num_experts, device, selection_bias)


def _patch_mlp(state: State, family: Family, layer_path: str, layer: nn.Module, projections: list[LoraLinear]) -> None:
    assert family.swiglu is not None
    routed = state.injection.strategy == "mixture_lora"
    shared = _router(state, projections[0].base) if routed and state.moe.router_scope == "mlp" else None
    kind = ExpertMLPs if routed and state.moe.expert_scope == "mlp" else LoraMLP
    mlp = kind(family.swiglu, projections, shared)
    path = f"{layer_path}.{family.mlp}"
    owners = [path] if shared is not None else [f"{path}.{name}" for name in family.swiglu]
    _register(state, mlp, owners, mlp.routers())
    for i, projection in enumerate(projections if projections[0].router is not None else ()):  # for when it is called
        row = mlp.rows.start + i
        projection.shared.ledger, projection.shared.rows = mlp.ledger, slice(row, row + 1)
    parent_path, _, name = family.mlp.rpartition(".")
    parent = layer.get_submodule(parent_path)
    original = parent.get_submodule(name)
    mlp.train(original.training)
    state.replaced.append((parent, name, original))
    setattr(parent, name, mlp)


def _share(state: State, layer_path: str, paths: list[str], members: list[LoraLinear]) -> None:
    shared = SharedInput(members)
    for member in members:
        member.shared = shared
    routers = [m.router for m in members if m.router is not None]
    _register(state, shared, [f"{layer_path}.{path}" for path in paths], routers)


def _register(state: State, owner: LoraMLP | SharedInput, names: list[str], routers: list[Router]) -> None:
    """Give ``owner`` the ledger and the rows of its routers; plain LoRAs have none and need neither."""
    if not routers:
        return
    owner.ledger = state.ledger
    start = len(state.ledger.names)
    for name, router in zip(names, routers, strict=True):
        state.ledger.register(name)
        state.routers.append(router)
    owner.rows = slice(start, len(state.ledger.names))
