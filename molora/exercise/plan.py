"""What the exercise trains: three ways to spend the same tokens."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from molora import adapter, chat, data, packing
from molora.config import Config, Phase, load, resolve
from molora.data import Example, read_rows
from molora.errors import UserError
from molora.files import write_text
from molora.patch import inject, parameter_groups

TWO, ONE, LORA = "two-stage", "one-stage", "one-lora"
WAYS = {TWO: "mixture, two stages", ONE: "mixture, one stage", LORA: "one LoRA, two stages"}


@dataclass(frozen=True)
class Run:
    """One call of the trainer."""

    name: str
    preset: Path
    data: tuple[Path, ...]
    overrides: tuple[str, ...]

    def config(self, model: str) -> Config:
        """The configuration as the trainer resolves it; ``model`` is what it starts from."""
        paths = json.dumps([str(path) for path in self.data])
        return resolve(load(self.preset, [*self.overrides, f"model_name={json.dumps(model)}", f"data.path={paths}"]))


@dataclass(frozen=True)
class Way:
    """One way to train the model: its runs one after another, and what they cost."""

    runs: tuple[Run, ...]
    trainable: int
    """Parameters of the adapters and routers that some phase trains."""
    rank: int
    steps: int
    """Optimizer steps of all runs."""
    tokens: int
    """Tokens that all runs read; padding does not count."""


@dataclass(frozen=True)
class Plan:
    """The three ways for one seed."""

    model: str
    ways: dict[str, Way]


def plan(stages: Sequence[tuple[Path, Sequence[str]]], seed: int, out: Path) -> Plan:
    """How to train all three ways from two presets with their overrides; writes the mixed rows below ``out``.

    Loads a tokenizer and no weights. Raises :class:`UserError` for bad presets, data or model.
    """
    written = [load(preset, overrides) for preset, overrides in stages]
    for (preset, _), config in zip(stages, written, strict=True):
        if config.injection.strategy != "mixture_lora":
            raise UserError(f"{preset}: injection.strategy is {config.injection.strategy}; give mixture_lora")
        if config.data.path is None:
            raise UserError(f"{preset}: data.path is missing")
    model = written[0].model_name
    base, tokenizer = adapter.describe_base(written[0])
    assert model is not None  # describe_base has seen it
    chat.settle_template(tokenizer)

    def run(way: str, stage: int, paths: Sequence[Path], *further: str) -> Run:
        preset, overrides = stages[stage]
        name = f"{way}/seed-{seed}/stage{stage + 1}" if way != ONE else f"{way}/seed-{seed}/mixed"
        return Run(name, preset, tuple(paths), (*overrides, f"seed={seed}", *further))

    own = [_paths(config) for config in written]
    groups = {group for config in written for phase in config.training.phases for group in phase.trainable}
    two = [run(TWO, stage, own[stage]) for stage in (0, 1)]
    read = [read_by(one.config(model), tokenizer) for one in two]
    tokens = sum(_tokens(examples) for examples in read)
    shape = trainable(two[0].config(model), base, groups)

    mixed = out / ONE / f"seed-{seed}" / "mixed.jsonl"
    _write_mixed(mixed, [example for examples in read for example in examples], [*own[0], *own[1]], seed)
    longest = max(config.data.max_length for config in written)
    further = [f"data.max_length={longest}", "training.val_size=0"]
    steps, reached = steps_for(tokens, run(ONE, 0, [mixed], *further).config(model), tokenizer)
    units = written[0].training.grad_accum_steps if written[0].training.step_unit == "micro" else 1
    single = run(ONE, 0, [mixed], *further, f"training.max_train_steps={steps * units}")

    rank = rank_for(shape, two[0].config(model), base, groups)
    lora = [run(LORA, stage, own[stage], *_plain(config, rank)) for stage, config in enumerate(written)]

    def way(runs: Sequence[Run], tokens: int) -> Way:
        configs = [one.config(model) for one in runs]
        steps = sum(config.training.max_train_steps for config in configs)
        return Way(tuple(runs), trainable(configs[0], base, groups), configs[0].injection.lora_r, steps, tokens)

    return Plan(model, {TWO: way(two, tokens), ONE: way([single], reached), LORA: way(lora, tokens)})


def read_by(config: Config, tokenizer: Any) -> list[Example]:
    """The sequences that a run reads, in its order."""
    training = config.training
    examples = _examples(config, tokenizer)
    count = training.max_train_steps * training.batch_size * training.grad_accum_steps
    return [examples[i] for i in data.RunOrder(len(examples), config.seed, start=0, stop=count)]


def steps_for(tokens: int, config: Config, tokenizer: Any) -> tuple[int, int]:
    """(optimizer steps, tokens): where a run comes closest to reading so many ``tokens``."""
    sequences = config.training.batch_size * config.training.grad_accum_steps
    examples = _examples(config, tokenizer)
    order = iter(data.RunOrder(len(examples), config.seed, start=0, stop=sys.maxsize))
    reached = [0]
    while reached[-1] < tokens:
        reached.append(reached[-1] + _tokens([examples[i] for i in islice(order, sequences)]))
    steps = min(range(1, len(reached)), key=lambda n: abs(reached[n] - tokens))
    return steps, reached[steps]


def _examples(config: Config, tokenizer: Any) -> list[Example]:
    """What the trainer makes of a run's data."""
    assert config.data.path is not None
    rows, _ = data.hold_out(read_rows(config.data.path), config.training.val_size, config.seed)
    examples = data.encode_rows(tokenizer, rows, config.data.max_length)
    if config.data.packing:
        examples = packing.pack(examples, config.data.max_length)
    return examples.rows


def _paths(config: Config) -> list[Path]:
    path = config.data.path or []
    return [Path(one) for one in ([path] if isinstance(path, str) else path)]


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


def _write_mixed(path: Path, read: Sequence[Example], sources: Sequence[Path], seed: int) -> None:
    """The rows of ``read``, each as often as it was read, shuffled."""
    rows = {row.pop("where"): row for row in read_rows(sources)}
    packed = [example.where.split(", ") if example.lengths else [example.where] for example in read]
    wheres = [where for pack in packed for where in pack]
    if missing := [where for where in wheres if where not in rows]:
        raise UserError(f"{missing[0]}: a file name with a comma in it; rename the file")
    random.Random(seed).shuffle(wheres)
    write_text(path, "".join(json.dumps(rows[where], ensure_ascii=False) + "\n" for where in wheres))


def trainable(config: Config, base: PreTrainedConfig, groups: set[str]) -> int:
    """Parameters in ``groups`` that ``config`` puts into a model of the shape ``base``; nothing is allocated."""
    with FakeTensorMode():
        model = inject(AutoModelForCausalLM.from_config(base), config)
        members = [member for group, of in parameter_groups(model).items() if group in groups for member in of]
        return sum(parameter.numel() for _, parameter in members)


def rank_for(parameters: int, config: Config, base: PreTrainedConfig, groups: set[str]) -> int:
    """The rank of one LoRA on the same projections that comes closest to so many trainable parameters."""
    one = config.injection.model_copy(update={"strategy": "dense_lora", "lora_r": 1})
    return max(1, round(parameters / trainable(config.model_copy(update={"injection": one}), base, groups)))


def _plain(config: Config, rank: int) -> list[str]:
    """Overrides that make a preset's mixture one LoRA of ``rank``, with the same scaling alpha / r."""
    injection = config.injection
    phases: list[Phase] = []
    for phase in config.training.phases:
        if rest := [group for group in phase.trainable if group != "router"]:
            phases.append(phase.model_copy(update={"trainable": rest, "step": phase.step if phases else 0}))
    return [
        "injection.strategy=dense_lora",
        f"injection.lora_r={rank}",
        f"injection.lora_alpha={injection.lora_alpha / injection.lora_r * rank}",
        f"training.phases={json.dumps([phase.model_dump() for phase in phases])}",
    ]
