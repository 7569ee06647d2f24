"""A whole training step of a random-initialised Llama: the recipe's placement beside a frozen model and the peers.

``--model tiny`` has the shapes of the CPU goal, ``--model llama3.2-3b`` with ``--rows 10 --length 512`` and
``--rows 8 --length 1024`` those of the recipe's two stages. One micro-batch; all variants share the frozen weights, the
loss and the optimizer, and send a gradient down to the embeddings. The check runs in fp32 on at most two layers of the
model and 512 tokens, from which passes are compiled on a CPU: there no rounding changes which experts are chosen.
(``mlp`` checks the 16-bit kernels.)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import molora_kernels as mk
from bench import check, measure, peers, record
from bench.arguments import add_run, add_shape
from bench.measure import MIB, Outputs, Variant
from bench.problem import DTYPES
from molora import config as configuration
from molora import inject, parameter_groups, routing
from molora.config import Injection, LoadBalance, MoE
from molora.data import Batch
from molora.loss import causal_lm_loss
from molora.patch import compile_layers
from molora.trainer import checkpoint_activations
from molora_kernels.grouped_lora.dispatch import Form

BASE = "frozen base"
COMPILED = ", compiled"
"""Ends the name of a variant whose decoder layers went through ``torch.compile``, as ``model.compile`` asks for."""

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024,
    },
    "llama3.2-3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What is trained. Defaults: the CPU goal."""

    model: str = "tiny"
    layers: int = 0
    """Decoder layers; 0 for the model's own number."""
    rows: int = 4
    length: int = 512
    experts: int = 4
    top_k: int = 2
    rank: int = 32
    dropout: float = 0.0
    checkpointing: str = "none"
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def config(self) -> LlamaConfig:
        given = dict(MODELS[self.model])
        if self.layers:
            given["num_hidden_layers"] = self.layers
        return LlamaConfig(**given, max_position_embeddings=self.length, tie_word_embeddings=True)


@dataclass
class Step:
    """A model and how it takes a step."""

    model: Any
    leaves: Sequence[Tensor] = ()
    routers: bool = False
    """molora's, whose losses enter the gradient."""
    optimizer: torch.optim.Optimizer | None = None
    form: Form = "auto"
    record: routing.Record | None = None

    def forward(self, batch: Batch) -> Tensor:
        if self.routers:
            self.record = routing.record(self.model, batch.attention_mask)
            with routing.using(self.model, self.record), mk.use_form(self.form):
                loss, tokens = causal_lm_loss(self.model, batch)
        else:
            loss, tokens = causal_lm_loss(self.model, batch)
        return loss / tokens

    def backward(self, loss: Tensor) -> None:
        if self.record is None:
            loss.backward()
            return
        routing.combine(self.model, [self.record])
        with routing.using(self.model, self.record):
            loss.backward()

    def update(self) -> None:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.leaves, lr=1e-6, fused=True)
        nn.utils.clip_grad_norm_(self.leaves, 1.0)
        self.optimizer.step()

    def variant(self, batch: Batch) -> Variant:
        def backward(loss: Any, _: Outputs) -> None:
            self.backward(loss)

        update = self.update if self.leaves else None
        return Variant(lambda _: self.forward(batch), self.leaves, backward=backward, update=update)

    def static_mib(self) -> float:
        """Weights, and the optimizer's two moments of what trains."""
        weights = {t.data_ptr(): t.nbytes for t in chain(self.model.parameters(), self.model.buffers())}
        return (sum(weights.values()) + 2 * sum(leaf.nbytes for leaf in self.leaves)) / MIB


# --- variants ----------------------------------------------------------------------------------------------------

Build = Callable[[Any, Shape], Step]
"""From a frozen base, whose weights are shared and not changed."""


def _sharing(base: Any) -> Any:
    """A copy of the model's modules over the same weights."""
    return copy.deepcopy(base, {id(t): t for t in chain(base.parameters(), base.buffers())})


def frozen(base: Any, shape: Shape) -> Step:
    return Step(_sharing(base))


def molora(form: Form = "auto", moe: MoE | None = None) -> Build:
    def build(base: Any, shape: Shape) -> Step:
        model = inject(_sharing(base), injection(shape), moe)
        leaves = [p for group in parameter_groups(model).values() for _, p in group]
        return Step(model, leaves, routers=True, form=form)

    return build


def injection(shape: Shape) -> Injection:
    # B is not zero here, so that a wrong expert shows; it costs the same.
    given = {
        "num_experts": shape.experts, "top_k": shape.top_k, "lora_r": shape.rank, "lora_alpha": 2 * shape.rank,
        "lora_dropout": shape.dropout, "init_b_std": 0.02,
    }  # fmt: skip
    return configuration.check(Injection, given, where="the step's experts")


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peft(rank: int) -> Build:
    """PEFT's LoRA on all seven projections."""

    def build(base: Any, shape: Shape) -> Step:
        peers.require("peft")
        from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports] # optional

        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=shape.dropout, target_modules=list(LINEARS),
            init_lora_weights=False,
        )  # fmt: skip
        model: Any = inject_adapter_in_model(config, _sharing(base))
        return Step(model, [p for p in model.parameters() if p.requires_grad])

    return build


def eulerforge(base: Any, shape: Shape) -> Step:
    """EulerForge's ``mixture_lora`` on the MLPs and its plain LoRA on attention, with molora's weights."""
    peers.require("eulerforge")
    from eulerforge.modules.lora import LoRALinear  # pyright: ignore[reportMissingImports] # optional
    from eulerforge.modules.mixture_lora import (  # pyright: ignore[reportMissingImports]
        replace_linears_with_mixture_lora_inplace,
    )

    given, model = molora()(base, shape).model, _sharing(base)
    for theirs, ours in zip(model.model.layers, given.model.layers, strict=True):
        replace_linears_with_mixture_lora_inplace(
            theirs.mlp, peers.NAMES, num_experts=shape.experts, top_k=shape.top_k, r=shape.rank,
            alpha=2 * shape.rank, dropout=shape.dropout,
        )  # fmt: skip
        for name in LINEARS[:4]:
            linear = LoRALinear(getattr(theirs.self_attn, name), shape.rank, 2 * shape.rank, shape.dropout)
            peers.set_to(linear.lora_A, getattr(ours.self_attn, name).lora_a)
            peers.set_to(linear.lora_B, getattr(ours.self_attn, name).lora_b)
            setattr(theirs.self_attn, name, linear)
        for name, projection in zip(peers.NAMES, ours.mlp.projections(), strict=True):
            layer = getattr(theirs.mlp, name)
            peers.set_to(layer.router.weight, projection.router.weight)
            peers.set_to(layer.router.bias, projection.router.bias)
            for e, branch in enumerate(layer.experts):
                part = slice(e * shape.rank, (e + 1) * shape.rank)
                peers.set_to(branch.loraA, projection.lora_a[part])
                peers.set_to(branch.loraB, projection.lora_b[:, part])
    return Step(model, [p for p in model.parameters() if p.requires_grad])


STEPS: dict[str, Build] = {
    BASE: frozen,
    "molora": molora(),
    "molora dense": molora("dense"),
    "molora grouped": molora("grouped"),
    "PEFT LoRA r=64": peft(64),
    "PEFT LoRA r=128": peft(128),
    "eulerforge": eulerforge,
}


# --- correctness -------------------------------------------------------------------------------------------------


def reference(name: str, step: Step, base: Any, shape: Shape) -> tuple[Step, bool]:
    """What a variant must equal, built from it: molora by its reference implementation, PEFT by that of a plain LoRA
    with its weights; EulerForge, which holds molora's weights, as molora. And whether the adapters' own gradients can
    be compared (the router losses, which no peer has, are in them)."""
    if name == BASE:
        return step, False
    if name.startswith("molora"):
        return Step(step.model, step.leaves, routers=True), True
    if name == "eulerforge":
        silent = MoE(router_z_loss_coef=0.0, load_balance=LoadBalance(type="none"))
        return Step(molora(moe=silent)(base, shape).model, routers=True), False
    theirs = {path: module for path, module in step.model.named_modules() if hasattr(module, "lora_A")}
    rank = next(iter(theirs.values())).r["default"]
    plain = Injection(strategy="dense_lora", lora_r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    model = inject(_sharing(base), plain)
    for path, module in theirs.items():
        ours: Any = model.get_submodule(path)
        peers.set_to(ours.lora_a, module.lora_A.default.weight)
        peers.set_to(ours.lora_b, module.lora_B.default.weight)
    return Step(model), False


def fault(name: str, shape: Shape) -> str | None:
    """What is wrong with a variant, or None. Raises :class:`peers.Absent` for one that cannot run here."""
    given = MODELS[shape.model]
    layers = min(2, shape.layers or given["num_hidden_layers"])
    small = replace(shape, layers=layers, rows=2, length=256, dtype="fp32", dropout=0.0, checkpointing="none")
    base, batch = base_model(small, vocabulary=512), batch_of(small, vocabulary=512)
    plain = name.removesuffix(COMPILED)
    torch.manual_seed(shape.seed)
    step = STEPS[plain](base, small)
    torch.manual_seed(shape.seed)
    eager, adapters = reference(plain, step if name == plain else STEPS[plain](base, small), base, small)
    if name != plain:
        compile_layers(step.model)
    found = _results(step, batch, adapters)
    with mk.use_backend("reference"):
        allowed = _results(eager, batch, adapters)
        # In fp64 last: this changes the model in place.
        exact_step = Step(eager.model.double(), routers=eager.routers)
        if adapters:
            exact_step.leaves = [p for group in parameter_groups(eager.model).values() for _, p in group]
        exact = _results(exact_step, batch, adapters)
    return check.fault(found, exact, check.errors(allowed, exact), torch.float32)


def _results(step: Step, batch: Batch, adapters: bool) -> check.Results:
    """Last hidden states, the gradient of the embeddings, and with ``adapters`` that of every adapter."""
    seen: dict[str, Tensor] = {}
    embeddings = step.model.get_input_embeddings()
    hooks = [
        embeddings.register_forward_hook(lambda _module, _input, out: seen.update(embedded=out.requires_grad_())),
        step.model.base_model.register_forward_hook(
            lambda _module, _input, out: seen.update(hidden=out.last_hidden_state.detach())
        ),
    ]
    for leaf in step.leaves:
        leaf.grad = None
    step.backward(step.forward(batch))
    for hook in hooks:
        hook.remove()
    assert seen["embedded"].grad is not None
    found = {"hidden states": [seen["hidden"]], "d embeddings": [seen["embedded"].grad]}
    if adapters:
        found["d adapters"] = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in step.leaves]
    return {kind: [t.cpu().double() for t in tensors] for kind, tensors in found.items()}


# --- the command -------------------------------------------------------------------------------------------------


def base_model(shape: Shape, vocabulary: int | None = None) -> Any:
    """A frozen random Llama; its embeddings' outputs require grad."""
    config = shape.config()
    config.vocab_size = vocabulary or config.vocab_size
    torch.manual_seed(shape.seed)
    with torch.device(shape.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[shape.dtype])
    return model.requires_grad_(False).train()


def batch_of(shape: Shape, vocabulary: int | None = None) -> Batch:
    """Random tokens; each predicts the next."""
    draw = torch.Generator().manual_seed(shape.seed)
    ids = torch.randint(vocabulary or MODELS[shape.model]["vocab_size"], (shape.rows, shape.length), generator=draw)
    predictors = torch.arange(shape.tokens).view_as(ids)[:, :-1].flatten()
    return Batch(ids, torch.ones_like(ids), ids, predictors, shape.tokens, [], []).to(shape.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = ("none", "non_reentrant", "reentrant")
    add_shape(parser, Shape(), model=MODELS, checkpointing=kinds, dtype=DTYPES)
    add_run(parser)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="beside the frozen base")
    parser.add_argument(
        "--compile", action="store_true", help="base and molora through torch.compile too: minutes more"
    )


def run(options: argparse.Namespace) -> int:
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    torch.set_num_threads(options.threads)
    result = measured(shape, options.only, options.rounds, options.warmup, options.compile)
    title = f"training step, {shape.model}, {shape.dtype}, {shape.rows} x {shape.length} tokens, {shape.device}"
    record.show(title, result)
    if options.json:
        record.write(options.json, {"op": "step", "threads": options.threads, **result})
    return 1 if result["wrong"] else 0


def measured(
    shape: Shape, only: Sequence[str] | None, rounds: int, warmup: int, compiled: bool = False
) -> dict[str, Any]:
    """Check, then time: the part of a result that is about one shape."""
    injection(shape)  # raises for experts that no configuration can have, before the base is measured for them
    names = [name for name in STEPS if not only or name in (BASE, *only)]
    if compiled:
        names += [name + COMPILED for name in (BASE, "molora")]
    absent: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name in names:
        try:
            if found := fault(name, shape):
                wrong[name] = found
        except peers.Absent as reason:
            absent[name] = str(reason)
    torch.compiler.reset()  # a second shape would make the graphs of the first dynamic
    base, batch = base_model(shape), batch_of(shape)
    steps: dict[str, Step] = {}
    for name in names:
        if name not in absent and name not in wrong:
            steps[name] = STEPS[name.removesuffix(COMPILED)](base, shape)
            steps[name].model.enable_input_require_grads()
            checkpoint_activations(steps[name].model, shape.checkpointing)
            if name.endswith(COMPILED):
                compile_layers(steps[name].model)
    rows = []
    if BASE in steps:
        variants = {name: step.variant(batch) for name, step in steps.items()}
        upstream = torch.ones((), device=shape.device)
        weights = list(chain(base.parameters(), base.buffers()))
        for name, variant in list(variants.items()):
            if why := measure.out_of_memory(variant, batch.input_ids, upstream):
                absent[name] = f"it needs more memory than there is: {why}"
                del variants[name]
    if BASE in steps and BASE not in absent:
        rows = measure.rows(variants, batch.input_ids, upstream, weights, base=BASE, rounds=rounds, warmup=warmup)
    for row in rows:
        step = steps[row["variant"]]
        whole_ms = row["total_ms"] + row.get("update_ms", 0.0)
        row["tokens_per_s"] = round(1e3 * shape.tokens / whole_ms, 1)
        row["static_mib"] = round(step.static_mib(), 1)
        row["trained"] = sum(leaf.numel() for leaf in step.leaves)
    return {
        "shape": asdict(shape) | {"tokens": shape.tokens, "config": MODELS[shape.model]},
        "base": BASE,
        "rounds": rounds,
        "rows": rows,
        "not_measured": absent,
        "wrong": wrong,
    }
