"""One typed configuration: YAML file, then ``--set key.path=value``, then checked, then never changed.

Each key is a field below; its default and its documentation are stated here and nowhere else. pydantic parses and
checks types; what it reports is turned into one :class:`~molora.errors.UserError` that names the key, says what is
wrong and, for a misspelt key, what was probably meant.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from molora.errors import UserError

Group = Literal["router", "lora", "attn_lora"]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {value}")
    return value


def _named(paths: str | list[str] | None) -> str | list[str] | None:
    if paths == []:
        raise ValueError("an empty list names no file; give one JSONL file or several")
    return paths


Real = Annotated[float, AfterValidator(_finite)]
NonNegative = Annotated[Real, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[Real, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of keys. Unknown keys are refused, types are not guessed, values never change after the check."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class LoadPrecision(Section):
    mode: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] = "auto"
    """Storage of the frozen base. ``auto``: bf16 where the device has fast bf16 arithmetic, else fp32."""
    compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Dtype of the matmuls of an int8 or int4 base."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit number format (bitsandbytes)."""
    double_quant: bool = True
    """Quantise the quantisation constants of a 4-bit base too."""

    def bits(self) -> float | None:
        """What an element of a quantised base's linears takes, constants included; None if the base is not quantised.

        QLoRA (arXiv 2305.14314, section 3): an fp32 constant for 64; or 8 bits, and an fp32 one for 256 of those.
        """
        if self.mode == "int4":
            return 4 + (8 / 64 + 32 / (64 * 256) if self.double_quant else 32 / 64)
        return 8.0 if self.mode == "int8" else None


class Model(Section):
    load_precision: LoadPrecision = LoadPrecision()
    gradient_checkpointing: Literal["none", "non_reentrant", "reentrant"] = "none"
    """Recompute each decoder layer in backward instead of saving its activations."""
    compile: bool = False
    """Compile the decoder layers with ``torch.compile`` before training: minutes at the start, faster steps after."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention of transformers; ``auto`` leaves the choice to it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder. Only for sources that you trust."""


class AttnLora(Section):
    enabled: bool = True
    keywords: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    """Attention projections that get one plain LoRA (one expert, no router)."""


class Injection(Section):
    """Where adapters go and what shape they have."""

    strategy: Literal["mixture_lora", "dense_lora"] = "mixture_lora"
    """``mixture_lora``: routed experts on the targets. ``dense_lora``: one LoRA on each target, no router."""
    num_experts: Annotated[int, Field(ge=1, le=64)] = 4
    top_k: Annotated[int, Field(ge=1, le=8)] = 2
    """Experts used per token; their gates are renormalised to sum 1 (for top_k = 1 the gate is the probability)."""
    lora_r: Positive = 32
    lora_alpha: Annotated[Real, Field(gt=0)] = 64.0
    """Adapter outputs are scaled by ``lora_alpha / lora_r``. It does not follow ``lora_r``: set both."""
    lora_dropout: Probability = 0.0
    init_b_std: NonNegative = 0.0
    """Standard deviation of the start of B. 0: the patched model starts as the base model exactly."""
    target_keywords: list[str] = ["gate_proj", "up_proj", "down_proj"]
    """Projections that get the strategy's adapters; attention projections may be named too."""
    start_layer: Count = 0
    num_layers: Count = 0
    """Decoder layers to patch, from ``start_layer``; 0 means all that follow."""
    stride: Positive = 1
    """Patch every n-th layer of that range."""
    layer_indices: list[Count] | None = None
    """Exactly these layers; replaces ``start_layer``, ``num_layers`` and ``stride``."""
    attn_lora: AttnLora = AttnLora()

    @model_validator(mode="after")
    def _check(self) -> Injection:
        if self.strategy == "mixture_lora":
            if self.num_experts < 2:
                raise ValueError(
                    f"num_experts={self.num_experts}: a mixture needs at least 2; for one LoRA use strategy: dense_lora"
                )
            if self.top_k > self.num_experts:
                raise ValueError(f"top_k={self.top_k} is larger than num_experts={self.num_experts}")
        if not self.target_keywords and not (self.attn_lora.enabled and self.attn_lora.keywords):
            raise ValueError("no projection is named: set target_keywords, or attn_lora.keywords with enabled: true")
        return self


class LoadBalance(Section):
    type: Literal["aux_loss", "aux_loss_free", "none"] = "aux_loss"
    """``aux_loss``: Switch Transformer's loss. ``aux_loss_free``: a bias on the selection only (arXiv 2408.15664)."""
    aux_loss_coef: NonNegative = 0.001
    bias_update_speed: NonNegative = 0.001
    """Step of the selection bias per optimizer step, for ``aux_loss_free``."""
    scope: Literal["step", "micro_batch"] = "step"
    """Tokens over which an expert's load is counted. ``step``: all micro-batches of an optimizer step, so that
    accumulation gives the gradient of one large batch; their graphs are held until the last forward, which is cheap
    with gradient checkpointing. ``micro_batch``: each alone; less memory when ``grad_accum_steps`` is large."""


class MoE(Section):
    router_z_loss_coef: NonNegative = 0.0001
    router_dtype: Literal["float32"] = "float32"
    """Router logits, softmax and losses are fp32, always; the key exists so that other tools' files run here."""
    router_scope: Literal["projection", "mlp"] = "projection"
    """``projection``: each projection has a router. ``mlp``: one router, fed by the MLP's input, for all three."""
    expert_scope: Literal["projection", "mlp"] = "projection"
    """``projection``: experts are weighed in each projection, before the activation. ``mlp``: an expert is an MLP with
    LoRAs of its own, and whole MLPs are weighed, as in MixLoRA; needs ``router_scope: mlp``. Costs an activation for
    each expert, see :class:`molora.layers.ExpertMLPs`."""
    load_balance: LoadBalance = LoadBalance()

    @model_validator(mode="after")
    def _check(self) -> MoE:
        if self.expert_scope == "mlp" and self.router_scope != "mlp":
            raise ValueError("expert_scope: mlp weighs whole MLPs, so it needs router_scope: mlp")
        return self


class Phase(Section):
    step: Count
    """Optimizer step at which the phase starts."""
    trainable: Annotated[list[Group], Field(min_length=1)]
    """Parameter groups that train: ``router``, ``lora`` (adapters on the targets), ``attn_lora``."""


STEP_COUNTS = ("max_train_steps", "warmup_steps", "val_steps", "save_steps", "log_steps")
"""Of a training section, besides those of its phases."""


class Training(Section):
    type: Literal["sft", "dpo", "orpo", "rm", "ppo"] = "sft"
    phases: Annotated[list[Phase], Field(min_length=1)] = [Phase(step=0, trainable=["router", "lora", "attn_lora"])]
    lr: NonNegative = 5e-5
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: NonNegative = 0.0
    warmup_steps: Count = 0
    max_train_steps: Positive = 1000
    batch_size: Positive = 8
    """Rows per micro-batch."""
    grad_accum_steps: Positive = 1
    """Micro-batches per optimizer step; gradients are weighted by tokens."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How the processes that ``torchrun`` starts share the work. ``ddp``: each holds the whole model. ``fsdp``: base,
    adapters and optimizer are spread over them. ``batch_size`` and ``grad_accum_steps`` are those of one process."""
    max_grad_norm: NonNegative = 1.0
    """Gradient clipping threshold; 0 turns clipping off."""
    max_skipped_steps: Positive = 5
    """A step whose loss or gradient is not finite changes no weight; after so many in a row the run stops."""
    step_unit: Literal["optimizer", "micro"] = "optimizer"
    """Unit of every step count in this section. ``micro`` counts micro-batches instead of optimizer steps; it
    is converted once, when the configuration is resolved."""
    val_size: Count = 0
    """Rows held out of ``data.path`` for evaluation during training."""
    val_steps: Count = 0
    """Evaluate on the held-out rows every so many steps; 0 means at the end only."""
    save_steps: Count = 0
    """Write a checkpoint every so many steps; 0 means at the end only."""
    save_total_limit: Positive | None = None
    """Keep only so many of the newest ``checkpoint-<step>`` folders."""
    log_steps: Positive = 10
    num_workers: Count = 0
    deterministic: bool = False
    """Have PyTorch compute the same bits each time on a GPU, where the backward of its attention adds in any order
    otherwise, and is faster so. molora's kernels, and a CPU, give the same bits either way."""

    @model_validator(mode="after")
    def _check(self) -> Training:
        if self.type != "sft":
            raise ValueError(f"type={self.type} is not part of molora: it trains type: sft only")
        steps = [phase.step for phase in self.phases]
        if steps[0] != 0:
            raise ValueError(f"phases.0.step is {steps[0]}: the first phase starts at step 0")
        if any(late <= early for early, late in itertools.pairwise(steps)):
            raise ValueError(f"phases are out of order: their steps are {steps} and must rise")
        return self

    def in_optimizer_steps(self) -> Training:
        """This section with every step count in optimizer steps (rounded up) and ``step_unit: optimizer``."""
        if self.step_unit == "optimizer":
            return self

        def convert(micro: int) -> int:
            return -(-micro // self.grad_accum_steps)

        for i, (early, late) in enumerate(itertools.pairwise(phase.step for phase in self.phases)):
            if convert(early) == convert(late):
                raise UserError(
                    f"training.phases.{i}.step={early} and training.phases.{i + 1}.step={late} are one optimizer step, "
                    f"since training.step_unit=micro and training.grad_accum_steps={self.grad_accum_steps}; set them "
                    "at least so far apart"
                )
        changed: dict[str, Any] = {name: convert(getattr(self, name)) for name in STEP_COUNTS}
        changed["phases"] = [phase.model_copy(update={"step": convert(phase.step)}) for phase in self.phases]
        return self.model_copy(update=changed | {"step_unit": "optimizer"})


class Data(Section):
    format: Literal["raw"] = "raw"
    """``raw``: JSONL rows as text, tokenised here."""
    task: Literal["sft"] = "sft"
    path: Annotated[str | list[str] | None, AfterValidator(_named)] = None
    """JSONL file or files with rows ``{"prompt", "response"}``, ``{"text"}`` or ``{"messages"}``."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens per row; longer rows are truncated at the end and then carry no end-of-sequence token."""
    packing: bool = False
    """Put several rows into one sequence of ``max_length``, so that little is padded. Each row attends to itself alone
    and has the loss that it has alone. ``training.batch_size`` then counts sequences, not rows."""
    cache: bool = True
    """Keep tokenised rows in ``~/.cache/molora``, by content: whatever changes, none is stale."""


class Logging(Section):
    metrics_level: Literal["minimal", "advanced"] = "minimal"
    """``advanced`` adds to ``metrics.jsonl`` each router's load, and that of each domain of the rows."""
    tensorboard: bool = False
    """The numbers of ``metrics.jsonl`` as curves of TensorBoard too, in ``tensorboard/`` of the output folder."""
    wandb: bool = False
    """The same to Weights & Biases; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE=offline say where they go."""


class Kernels(Section):
    backend: Literal["auto", "triton", "torch", "inductor", "reference"] = "auto"
    """``triton``: kernels for CUDA. ``torch``: plain PyTorch. ``inductor``: the same with C++ kernels, on a CPU with a
    C++ compiler (g++, or what CXX names), which it calls for some fifteen seconds in a machine's first step.
    ``reference``: the definition, slow. ``auto``: the first of triton, inductor and torch that is possible."""
    form: Literal["auto", "dense", "grouped"] = "auto"
    """Every expert on every token, or the chosen ones alone on tokens grouped by them; ``auto``: the faster one."""


class Config(Section):
    backbone: str | None = None
    """Architecture the file was written for, as a check against the model loaded: ``llama``, …; null: any."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, …"""
    model_name: str | None = None
    """A base model, or an adapter such as the ``final`` folder of an earlier stage; a folder or a hub name."""
    model: Model = Model()
    injection: Injection = Injection()
    moe: MoE = MoE()
    training: Training = Training()
    data: Data = Data()
    logging: Logging = Logging()
    kernels: Kernels = Kernels()
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 42

    @model_validator(mode="after")
    def _check(self) -> Config:
        present = {"lora"} if self.injection.target_keywords else set[str]()
        if self.injection.strategy == "mixture_lora" and self.injection.target_keywords:
            present.add("router")
        if self.injection.attn_lora.enabled and set(self.injection.attn_lora.keywords) - set(
            self.injection.target_keywords
        ):
            present.add("attn_lora")
        if self.data.packing and self.model.attn_implementation == "flash_attention_2":
            raise ValueError(
                "data.packing needs the attention mask that keeps packed rows apart, which "
                "model.attn_implementation=flash_attention_2 does not take: use sdpa, or packing: false"
            )
        for i, phase in enumerate(self.training.phases):
            if not present & set(phase.trainable):
                raise ValueError(
                    f"training.phases.{i}.trainable={phase.trainable} trains nothing: "
                    f"this injection has only {sorted(present)}"
                )
        return self


# --- reading -----------------------------------------------------------------------------------------------------

AnySection = TypeVar("AnySection", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-5`` as a string; people mean a number. Of a key that is there twice it takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?(?:[eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
# A path or a name may look like a date; no value is one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in _Loader.yaml_implicit_resolvers.items()
}


def parse_value(text: str) -> Any:
    """The value of a ``--set key=text``, read as YAML: ``3``, ``1e-5``, ``true``, ``[a, b]``, ``null``."""
    return yaml.load(text, Loader=_Loader)


def load(preset: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a preset, apply ``key.path=value`` overrides in order, check, and return the configuration as written.

    Step counts keep their unit; :func:`resolve` converts them. A preset is a file, or else one of those that come with
    molora (:func:`find_preset`). Raises :class:`UserError` for a missing or malformed file, an unknown key, a wrong
    type or a value out of range.
    """
    tree: dict[str, Any] = {}
    if preset is not None:
        tree = _read_yaml(find_preset(preset))
    given: dict[str, str] = {}
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise UserError(f"--set {override!r}: write it as key.path=value, e.g. training.lr=1e-5")
        try:
            value = parse_value(text)
        except (yaml.YAMLError, ValueError) as error:  # 0x_ looks like a number, and is none
            raise UserError(f"--set {override!r}: the value is not valid YAML ({_one_line(error)})") from error
        _assign(tree, key.strip().split("."), value, override)
        given[key.strip()] = f"--set {override}"
    return check(Config, tree, where=str(preset) if preset else "the configuration", given=given)


def presets_folder() -> Path:
    """Where the presets that come with molora are: in the installed package, or in the repository."""
    installed = Path(__file__).parent / "presets"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs" / "presets"


def find_preset(preset: str | Path) -> Path:
    """The file that ``preset`` names.

    A file that is there is meant. Else the end of its path is looked up among the presets that come with molora, so
    that ``configs/presets/reasoning/NAME.yml`` works in any folder, and so does ``NAME`` alone. Raises
    :class:`UserError` for anything else, with the names that there are.
    """
    if (path := Path(preset)).exists():
        return path
    folder = presets_folder()
    shipped = sorted(folder.rglob("*.yml"))
    for file in shipped:
        name = file.relative_to(folder)
        # Not with_suffix(): llama3.2_3b has a dot of its own.
        if {path, Path(f"{path}.yml")} & {Path("configs/presets", name), name, Path(name.name)}:
            return file
    names = ", ".join(file.stem for file in shipped)
    raise UserError(f"{preset}: no such file; --preset takes a YAML file or one of {names}")


def resolve(config: Config) -> Config:
    """``config`` with all step counts in optimizer steps: the form that training uses and saves."""
    return config.model_copy(update={"training": config.training.in_optimizer_steps()})


def without_effect(training: Training) -> Iterator[str]:
    """What of a resolved section does nothing: to be warned of, and no error, since a run that is tried for a few steps
    has such things too."""
    steps = training.max_train_steps
    for i, phase in enumerate(training.phases):
        if phase.step >= steps:
            yield (
                f"training.phases.{i} begins at optimizer step {phase.step} and training ends after {steps}, so it "
                f"never does; lower training.phases.{i}.step or raise training.max_train_steps"
            )
    if training.warmup_steps >= steps:
        yield (
            f"the warm-up of {training.warmup_steps} optimizer steps is not over when training ends after {steps}, so "
            "training.lr is never reached; lower training.warmup_steps or raise training.max_train_steps"
        )
    if training.val_steps and not training.val_size:
        yield f"training.val_steps={training.val_steps} evaluates nothing: no rows are held out; set training.val_size"


def check(
    section: type[AnySection],
    tree: Mapping[str, Any],
    where: str = "the configuration",
    given: Mapping[str, str] | None = None,
) -> AnySection:
    """Build a section from plain data; raise one :class:`UserError` that lists everything wrong with it.

    ``where`` is what the data came from, and ``given`` says so for single keys.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for item in error.errors():
            source = _source(".".join(map(str, item["loc"])), where, given or {})
            problems.setdefault(source, []).append(_teach(section, dict(item)))
        told = (f"{source}: {'; '.join(dict.fromkeys(of))}" for source, of in problems.items())
        raise UserError("; ".join(told)) from None


def _source(path: str, where: str, given: Mapping[str, str]) -> str:
    """What the value at ``path`` came from: ``where``, one of the keys ``given``, or several of both."""
    if over := [source for key, source in given.items() if f"{path}.".startswith(f"{key}.")]:
        return over[-1]
    inside = [source for key, source in given.items() if not path or key.startswith(f"{path}.")]
    return " with ".join([where, " ".join(inside)]) if inside else where


def to_yaml(config: Section) -> str:
    """The configuration as YAML with every key present, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)})") from error
    try:
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({_one_line(error)})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values at the top level, found {type(tree).__name__}")
    return tree


def _assign(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Set ``tree[keys[0]][keys[1]]… = value``; a number indexes a list, whose default is taken if the file has none."""
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise UserError(
                    f"--set {override!r}: {'.'.join(keys[:depth])} is a list of {len(node)}; "
                    f"use an index from 0 to {len(node) - 1}, not {key!r}"
                )
            slot: Any = int(key)
        else:
            slot = key
        if last:
            node[slot] = value
            return
        child = node[slot] if isinstance(node, list) else node.get(slot)
        if child is None:
            child = _default_at(keys[: depth + 1])
            node[slot] = child
        if not isinstance(child, dict | list):
            raise UserError(
                f"--set {override!r}: {'.'.join(keys[: depth + 1])} is a value, it has no key {keys[depth + 1]!r}"
            )
        node = child


def _default_at(keys: list[str]) -> Any:
    default: Any = Config().model_dump()
    for key in keys:
        default = default.get(key) if isinstance(default, dict) else None
    return default if isinstance(default, list) else {}


def _known_keys(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys allowed where ``location`` (a pydantic error location) points."""
    for key in location:
        field = section.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            continue
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return list(section.model_fields)


_OF_PEFT = {
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_keywords",
    "layers_to_transform": "layer_indices",
}
"""Keys by the names that PEFT gives them, or that people take them to have there."""


def _paths(section: type[BaseModel], above: str = "") -> Iterator[tuple[str, str]]:
    """(path, name) of every key within a section, sections too."""
    for name, field in section.model_fields.items():
        yield f"{above}{name}", name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{above}{name}.")


def _meant(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Paths that the unknown key at ``location`` may stand for: of that name here or in the whole configuration, else
    of one like it."""
    *above, leaf = map(str, location)
    leaf = _OF_PEFT.get(leaf, leaf)
    here = {name: ".".join([*above, name]) for name in _known_keys(section, location[:-1])}
    if leaf in here:
        return [here[leaf]]
    everywhere = list(_paths(Config))
    if found := [path for path, name in everywhere if name == leaf]:
        return found
    if close := difflib.get_close_matches(leaf, here, n=1):
        return [here[close[0]]]
    close = difflib.get_close_matches(leaf, [name for _, name in everywhere], n=1)
    return [path for path, name in everywhere if name in close]


def _teach(section: type[BaseModel], error: dict[str, Any]) -> str:
    location = tuple(error["loc"])
    path = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        meant = " or ".join(map(repr, _meant(section, location)))
        known = ", ".join(_known_keys(section, location[:-1]))
        return f"unknown key {path!r}; " + (f"did you mean {meant}?" if meant else f"known here: {known}")
    if error["type"] == "missing":
        return f"{path} is missing"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message.startswith("Input ") else message
    given = error.get("input")
    shown = f" (it is {given!r})" if isinstance(given, str | int | float | bool | type(None)) else ""
    return f"{path}: {message}{shown}" if path else message
