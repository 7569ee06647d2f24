"""Other people's layers, unchanged, on the same x, weights, experts and routers. Each is optional: ``[peers]``.

Where a peer computes something else than molora, it is held to its own formula, and the difference is said here.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import Variant
from bench.problem import Problem, Shape
from bench.variants import Build, Mlp, expert

NAMES = ("gate_proj", "up_proj", "down_proj")
ALWAYS_DROPS = 0.05
"""mixlora and moe-peft refuse a dropout of 0. Where none is wanted, their adapters are in eval mode, which turns
dropout off and changes nothing else."""


class Absent(Exception):
    """A peer that cannot run here, and why."""


def require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{module} is not installed")


@torch.no_grad()
def set_to(parameter: Any, value: Tensor | None) -> Tensor:
    assert isinstance(parameter, Tensor) and value is not None
    return parameter.copy_(value)


# --- one plain LoRA ----------------------------------------------------------------------------------------------


def peft(rank: int) -> Build:
    """PEFT's LoRA: no router, no experts, the price that people pay today. Its adapters have the weights' dtype."""

    def build(p: Problem, shape: Shape) -> Variant:
        return Variant(*_peft_mlp(p, shape, rank), _pairs)

    return build


def unsloth(rank: int) -> Build:
    """Unsloth's fused LoRA MLP, on PEFT's modules."""

    def build(p: Problem, shape: Shape) -> Variant:
        if not p.x.is_cuda:
            raise Absent("unsloth needs a CUDA device")
        if shape.dropout:
            raise Absent("unsloth's fused MLP has no dropout")
        require("unsloth")
        from unsloth.kernels.fast_lora import (  # pyright: ignore[reportMissingImports] # optional
            apply_lora_mlp_swiglu,
        )

        module, leaves = _peft_mlp(p, shape, rank)
        # Not in place: x is every variant's.
        return Variant(lambda x: apply_lora_mlp_swiglu(module, x[None], inplace=False)[0], leaves, _pairs)

    return build


def _peft_mlp(p: Problem, shape: Shape, rank: int) -> tuple[Any, list[Tensor]]:
    require("peft")
    from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports] # optional

    config = LoraConfig(
        r=rank, lora_alpha=int(p.scaling * rank), lora_dropout=shape.dropout, target_modules=list(NAMES)
    )
    module: Any = inject_adapter_in_model(config, Mlp(p.weights()))
    leaves: list[Tensor] = []
    for name, q in zip(NAMES, p.single(rank, p.x.dtype).projections, strict=True):
        layer = getattr(module, name)
        leaves += [set_to(layer.lora_A.default.weight, q.lora_a), set_to(layer.lora_B.default.weight, q.lora_b)]
    return module, leaves


def _pairs(gradients: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    return {"dA": list(gradients[0::2]), "dB": list(gradients[1::2])}


# --- routed experts ----------------------------------------------------------------------------------------------


def eulerforge(p: Problem, shape: Shape) -> Variant:
    """EulerForge's ``mixture_lora``: molora's mathematics, with experts and routers in the weights' dtype, and with
    dropout a mask for each expert."""
    require("eulerforge")
    if shape.top_k == 1:
        raise Absent("eulerforge renormalises the gate of a single expert to 1, which no router can learn from")
    from eulerforge.modules.mixture_lora import (  # pyright: ignore[reportMissingImports] # optional
        replace_linears_with_mixture_lora_inplace,
    )

    mlp: Any = Mlp(p.weights())
    replace_linears_with_mixture_lora_inplace(
        mlp, NAMES, num_experts=shape.experts, top_k=shape.top_k, r=shape.rank, alpha=p.scaling * shape.rank,
        dropout=shape.dropout,
    )  # fmt: skip
    branches = [[(b.loraA, b.loraB) for b in getattr(mlp, name).experts] for name in NAMES]
    leaves = _fill(p, shape, branches)
    for name, router in zip(NAMES, p.routers, strict=True):
        made = getattr(mlp, name).router
        leaves += [set_to(made.weight, router.weight), set_to(made.bias, router.bias)]

    def named(gradients: list[Tensor]) -> dict[str, list[Tensor]]:
        found = _by_kind(shape.experts)(gradients)
        pairs = zip(found["d router"][0::2], found["d router"][1::2], strict=True)
        return found | {"d router": [torch.cat([w, b[:, None]], dim=1) for w, b in pairs]}

    return Variant(mlp, leaves, named)


def mixlora(p: Problem, shape: Shape) -> Variant:
    """mixlora's sparse block: the formula of :func:`bench.variants.gated_blocks`. One router instead of three, and down
    computed once for each chosen expert."""
    require("mixlora")
    from mixlora.config import MixLoraConfig  # pyright: ignore[reportMissingImports] # optional
    from mixlora.lora_linear import LoraLinear  # pyright: ignore[reportMissingImports]
    from mixlora.model import MixLoraSparseMoe  # pyright: ignore[reportMissingImports]

    config = MixLoraConfig(
        model_type_="llama", dtype_=torch.float32, act_fn_="silu", num_experts_=shape.experts, top_k_=shape.top_k,
        jitter_noise_=0.0, lora_r_=shape.rank, lora_alpha_=int(p.scaling * shape.rank),
        lora_dropout_=shape.dropout or ALWAYS_DROPS,
    )  # fmt: skip
    base = Mlp(p.weights())
    moe = MixLoraSparseMoe(base, config)
    router = nn.Parameter(p.routers[0].weight.detach().clone())
    moe.gate_ = router
    branches: list[list[tuple[Any, Any]]] = []
    for name in NAMES:
        loras = [LoraLinear(getattr(base, name), config).train(shape.dropout > 0) for _ in range(shape.experts)]
        moe.experts_ |= {f"experts.{e}.{name}": lora for e, lora in enumerate(loras)}
        branches.append([(lora.lora_A.weight, lora.lora_B.weight) for lora in loras])
    return Variant(lambda x: moe(x[None])[0], [*_fill(p, shape, branches), router], _by_kind(shape.experts))


def moe_peft(p: Problem, shape: Shape) -> Variant:
    """MoE-PEFT's mixlora block: the formula of :func:`bench.variants.gated_blocks`."""
    require("moe_peft")
    _skip_init("moe_peft")
    from moe_peft.adapters.mixlora.config import MixLoraConfig  # pyright: ignore[reportMissingImports] # optional
    from moe_peft.adapters.mixlora.model import MixtralSparseMoe  # pyright: ignore[reportMissingImports]
    from moe_peft.common import FeedForward, LLMBatchConfig, LLMModelInput  # pyright: ignore[reportMissingImports]
    from moe_peft.models.modeling_llama import LlamaMLP  # pyright: ignore[reportMissingImports]

    config = MixLoraConfig(
        adapter_name="it", act_fn_="silu", num_experts_=shape.experts, top_k_=shape.top_k, jitter_noise_=0.0,
        router_init_range_=0.02, lora_r_=shape.rank, lora_alpha_=int(p.scaling * shape.rank),
        lora_dropout_=shape.dropout or ALWAYS_DROPS,
    )  # fmt: skip
    base, device = Mlp(p.weights()), str(p.x.device)
    args: Any = types.SimpleNamespace(device_=device, hidden_act_="silu")
    mlp = LlamaMLP(base.gate_proj, base.down_proj, base.up_proj, args)
    block = FeedForward(mlp)
    block.moes_["it"] = moe = MixtralSparseMoe(p.x.shape[1], torch.device(device), config, p.routers[0].weight)
    branches: list[list[tuple[Any, Any]]] = []
    for linear in (mlp.w1_, mlp.w3_, mlp.w2_):
        for e in range(shape.experts):
            linear.init_lora_weight(config, adapter_name=f"moe.it.experts.{e}")
        loras = [lora.train(shape.dropout > 0) for lora in linear.loras_.values()]
        branches.append([(lora.lora_a_.weight, lora.lora_b_.weight) for lora in loras])
    whole = LLMModelInput(batch_configs_=[LLMBatchConfig("it", 0, 1)])
    leaves = [*_fill(p, shape, branches), moe.gate_.weight]
    return Variant(lambda x: block(x[None], whole)[0][0], leaves, _by_kind(shape.experts))


def _fill(p: Problem, shape: Shape, branches: Sequence[Sequence[tuple[Any, Any]]]) -> list[Tensor]:
    """Copy the problem's experts into a peer's (A, B) of each projection and expert; all A, then all B, of each."""
    leaves: list[Tensor] = []
    for q, pairs in zip(p.projections, branches, strict=True):
        given = [expert(q, e, shape.rank, torch.float32) for e in range(shape.experts)]
        for side in (0, 1):
            leaves += [set_to(pair[side], values[side]) for pair, values in zip(pairs, given, strict=True)]
    return leaves


def _by_kind(experts: int) -> Callable[[list[Tensor]], dict[str, list[Tensor]]]:
    """Reads gradients in the order of :func:`_fill`; what comes after them is the routers'."""

    def named(gradients: list[Tensor]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {"dA": [], "dB": [], "d router": gradients[6 * experts :]}
        for start in range(0, 6 * experts, 2 * experts):
            middle, end = start + experts, start + 2 * experts
            found["dA"].append(torch.cat(gradients[start:middle], dim=0))
            found["dB"].append(torch.cat(gradients[middle:end], dim=1))
        return found

    return named


def _skip_init(package: str) -> None:
    """Make a package's modules importable without its ``__init__``, which imports data sets and metrics."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
