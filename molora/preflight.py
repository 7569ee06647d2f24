"""``--preflight``: what a stage needs, before it is started. Writes nothing to the output folder.

Memory is not guessed from formulas: one step of the stage, with its largest batch, is run on fake tensors, which have
shapes and no contents, while the bytes alive are counted. So whatever saves or frees memory in the code counts, and no
weight is loaded. It errs on the safe side: on fake tensors transformers makes an attention mask that it spares a real
batch, and repeats keys and values for it; that is up to a tenth where activations are not recomputed. Time is probed:
a few real steps on the device, if the stage fits it.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from molora import adapter, chat, data, loss, packing, phases, routing
from molora.config import STEP_COUNTS, Config, Training, check
from molora.data import Batch, Examples, Row
from molora.errors import UserError
from molora.patch import inject, parameter_groups
from molora.trainer import Trainer, checkpoint_activations

GB = 10**9
CUDA_CONTEXT = GB // 2
"""What a CUDA process takes before its first tensor, about."""
MARGIN = 0.95
"""Share of the memory that the estimate may take; the rest is fragmentation."""
PROBE_STEPS = 3
PROBE_SECONDS = 60.0
"""After which no further step is probed: a large model on a CPU takes minutes for one."""


@dataclass(frozen=True)
class Shape:
    """The largest batch of a run."""

    rows: int
    length: int
    labels: int
    """Tokens with a loss."""


@dataclass(frozen=True)
class Need:
    """Bytes."""

    base: int
    adapters: int
    """fp32 masters."""
    optimizer: int
    """Two moments of everything that is ever trained."""
    gradients: int
    activations: int
    """What the forwards of a step keep for its backwards; with ``load_balance.scope: step`` those of all micro-batches
    at once."""
    logits: int
    """One chunk of the loss."""
    peak: int
    """The most that is alive at any moment. Less than the sum: gradients come while activations go."""


def need(config: Config, base: PreTrainedConfig, dtype: torch.dtype, shape: Shape) -> Need:
    """What one step of ``config`` needs on a ``base`` model in ``dtype``, in the phase that trains most."""
    with FakeTensorMode(), no_init_weights():  # some of a vision tower's read what they have drawn
        attention = config.model.attn_implementation
        kwargs: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
        model = AutoModelForCausalLM.from_config(base, dtype=dtype, **kwargs)
        model.tie_weights()  # which from_config leaves to the initialisation that is left out
        base_bytes, unpacked = _bytes([*model.parameters(), *model.buffers()]), 0
        if bits := config.model.load_precision.bits():
            saved, unpacked = _quantise(model, bits)
            base_bytes -= saved
        inject(model, config).train()
        checkpoint_activations(model, config.model.gradient_checkpointing)
        adapters = [p for members in parameter_groups(model).values() for _, p in members]
        trained = _open_most(model, config)
        accumulated = config.training.grad_accum_steps
        one, two = (_run_step(model, config, shape, n) for n in (1, min(2, accumulated)))
        # Kept together, every further micro-batch keeps what the second kept; one by one, the second is like the rest.
        further = accumulated - 1 if config.moe.load_balance.scope == "step" else 1
        activations, peak = (a + further * (b - a) for a, b in zip(one, two, strict=True))
    ever = {group for phase in config.training.phases for group in phase.trainable}
    moments = [p for group, members in parameter_groups(model).items() if group in ever for _, p in members]
    vocabulary, itemsize = base.get_text_config().vocab_size, dtype.itemsize
    chunk = min(shape.labels, max(1, loss.CHUNK_ELEMENTS // vocabulary))
    static = base_bytes + _bytes(adapters) + 2 * _bytes(moments)
    return Need(
        base=base_bytes,
        adapters=_bytes(adapters),
        optimizer=2 * _bytes(moments),
        gradients=_bytes(trained),
        activations=activations,
        logits=chunk * vocabulary * (4 + (itemsize if itemsize < 4 else 0)),
        peak=static + peak + unpacked,
    )


class _Quantised(nn.Linear):
    """Stands for a quantised linear, which adapters call and whose weight they do not touch."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


def _quantise(model: PreTrainedModel, bits: float) -> tuple[int, int]:
    """Have every linear but the output head called as a quantised one is. Returns the bytes that its weights then take
    less, and those of the largest one as a product unpacks it."""
    linears = [m for m in model.modules() if type(m) is nn.Linear and m is not model.get_output_embeddings()]
    for linear in linears:
        linear.__class__ = _Quantised
    dense = [linear.weight.nbytes for linear in linears]
    packed = sum(linear.weight.numel() for linear in linears) * bits / 8
    return sum(dense) - round(packed), max(dense, default=0)


def _open_most(model: nn.Module, config: Config) -> list[nn.Parameter]:
    def trained() -> list[nn.Parameter]:
        return [p for members in parameter_groups(model).values() for _, p in members if p.requires_grad]

    def elements(phase: Any) -> int:
        phases.enter(model, phase)
        return sum(p.numel() for p in trained())

    phases.enter(model, max(config.training.phases, key=elements))
    return trained()


def _run_step(model: Any, config: Config, shape: Shape, micro_batches: int) -> tuple[int, int]:
    """Bytes that a step of so many micro-batches keeps from forward to backward, and its peak; like
    :meth:`molora.trainer.Trainer.train_step`."""
    model.zero_grad(set_to_none=True)
    size = (shape.rows, shape.length)
    positions = torch.zeros(size, dtype=torch.int64) if config.data.packing else None
    ids, mask, where = (torch.zeros(n, dtype=torch.int64) for n in (size, size, shape.labels))
    batch = Batch(ids, mask, ids, where, shape.rows * shape.length, [], [], positions)
    together = config.moe.load_balance.scope == "step"
    kept = 0
    with _Alive([*model.parameters(), *model.buffers()]) as alive:
        for scope in [micro_batches] if together else [1] * micro_batches:
            before, forwards = alive.now, []
            for _ in range(scope):
                record = routing.record(model, batch.attention_mask)
                with routing.using(model, record):
                    forwards.append((record, loss.causal_lm_loss(model, batch)[0]))
            kept = max(kept, alive.now - before)
            routing.combine(model, [record for record, _ in forwards], config.moe)
            while forwards:
                record, total = forwards.pop(0)
                with routing.using(model, record):
                    total.backward()
                del record, total
    return kept, alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, from their making until they are freed."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now + _inside(func, args))
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _inside(func: Any, args: Any) -> int:
    """Bytes that the MLP block makes and frees within one call: the intermediate in the forward of the grouped form;
    it, its gradient and that of one of its factors in backward (``molora_kernels/mlp_block``). On a CPU dropout and
    sorted tokens take one to four more for a moment, which are not counted."""
    name = func._schema.name
    if name == "molora::mlp_block_fwd" and args[-1] == "grouped":
        return args[0].shape[0] * args[1][0].shape[0] * args[0].itemsize
    if name == "molora::mlp_block_bwd":
        return 3 * args[2].shape[0] * args[3][0].shape[0] * args[2].itemsize
    return 0


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum({id(t): t.numel() * t.itemsize for t in tensors}.values())


# --- the stage ---------------------------------------------------------------------------------------------------


def largest_batch(config: Config, examples: Examples) -> Shape:
    """The longest rows together, and the most labels: no batch of the run is larger."""
    rows = min(config.training.batch_size, len(examples))
    lengths = sorted((len(example.input_ids) for example in examples.rows), reverse=True)
    labels = sorted((int((example.labels[1:] != chat.IGNORE).sum()) for example in examples.rows), reverse=True)
    longest = min(lengths[0], config.data.max_length)
    return Shape(rows, longest, min(sum(labels[:rows]), rows * longest))


def fitting(config: Config, examples: Examples, needs: Any, limit: float) -> list[str] | None:
    """The first settings of a ladder with which ``needs(config, shape)`` is within ``limit`` bytes, as ``--set``
    takes them: recompute activations, then smaller micro-batches of which more are accumulated, then shorter rows."""
    changed: dict[str, Any] = {}

    def ladder() -> Iterator[Config]:
        changed["model.gradient_checkpointing"] = "non_reentrant"
        yield _with(config, changed)
        batch, accumulated = config.training.batch_size, config.training.grad_accum_steps
        while batch > 1:
            batch, accumulated = -(-batch // 2), accumulated * 2
            changed.update({"training.batch_size": batch, "training.grad_accum_steps": accumulated})
            yield _with(config, changed)
        length = config.data.max_length
        while length > 256:
            length //= 2
            changed["data.max_length"] = length
            yield _with(config, changed)

    for candidate in ladder():
        if needs(candidate, largest_batch(candidate, examples)).peak <= limit:
            return [f"{key}={value}" for key, value in changed.items()]
    return None


def _in_optimizer_steps(training: Training) -> list[str]:
    """The counts of a preset that are in micro-batches: of smaller ones as many would be fewer rows."""
    return [
        "training.step_unit=optimizer",
        *(f"training.{name}={getattr(training, name)}" for name in STEP_COUNTS),
        *(f"training.phases.{i}.step={phase.step}" for i, phase in enumerate(training.phases)),
    ]


def _with(config: Config, changed: dict[str, Any]) -> Config:
    tree = config.model_dump()
    for key, value in changed.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node[part]
        node[last] = value
    return check(Config, tree)


def report(
    config: Config,
    output: Path,
    rows: Sequence[Row],
    memory_gb: float | None = None,
    step_unit: Literal["optimizer", "micro"] = "optimizer",
) -> None:
    """Print what the stage needs, and how long it takes if it fits here.

    ``memory_gb`` plans for a GPU with so much memory instead of the device here; ``step_unit`` is that of the preset,
    which ``config`` was resolved from. Raises :class:`~molora.errors.UserError` for a model or rows that do not fit
    together.
    """
    device = torch.device("cuda") if memory_gb else adapter.pick_device(config.device)
    base, tokenizer = adapter.describe_base(config)
    if memory_gb and config.model.load_precision.mode == "auto":
        config = _with(config, {"model.load_precision.mode": "bf16"})
    dtype = adapter.pick_dtype(config.model.load_precision, device)
    chat.settle_template(tokenizer)
    train_rows, _ = data.hold_out(rows, config.training.val_size, config.seed)
    examples = data.encode_rows(tokenizer, train_rows, config.data.max_length, cache=config.data.cache)
    count = len(examples)
    if config.data.packing:
        examples = packing.pack(examples, config.data.max_length)

    def needs(candidate: Config, shape: Shape) -> Need:
        return need(candidate, base, dtype, shape)

    shape = largest_batch(config, examples)
    kinds = dict.fromkeys(["none", "non_reentrant", config.model.gradient_checkpointing])
    found = {kind: needs(_with(config, {"model.gradient_checkpointing": kind}), shape) for kind in kinds}
    context = CUDA_CONTEXT if device.type == "cuda" else 0
    console = Console()
    console.print(_table(config, found, context, shape, dtype), _extent(config, examples, count), sep="\n")

    memory = memory_gb * GB if memory_gb else _memory(device)
    mine = found[config.model.gradient_checkpointing].peak + context
    fits = mine <= MARGIN * memory
    named = f"{memory / GB:.1f} GB" + (" of --memory-gb" if memory_gb else f" of {device}")
    if fits:
        kept = ", without what the CPU's allocator keeps of freed memory" if device.type == "cpu" else ""
        console.print(f"fits: {mine / GB:.2f} GB of the {named}{kept}", soft_wrap=True)
    else:
        console.print(f"warning: does not fit: {mine / GB:.2f} GB, and the {named} leave {MARGIN:.0%}")
        settings = fitting(config, examples, needs, MARGIN * memory - context)
        if settings and step_unit == "micro":
            settings += _in_optimizer_steps(config.training)
        told = " ".join(f"--set {setting}" for setting in settings or [])
        console.print(f"would fit: {told}" if settings else "no batch size or length would make it fit", soft_wrap=True)
    if memory_gb:
        console.print("time: not probed, since --memory-gb plans for another device")
    elif fits:
        console.print(_probe(config, output, rows, mine - context), soft_wrap=True)


def _table(config: Config, found: dict[str, Need], context: int, shape: Shape, dtype: torch.dtype) -> Table:
    mine = config.model.gradient_checkpointing
    table = Table(title=f"memory in GB: {shape.rows} x {shape.length} tokens x {config.training.grad_accum_steps}")
    table.add_column("model.gradient_checkpointing:")
    for kind in found:
        table.add_column(kind + (" (set)" if kind == mine else ""), justify="right")
    bits = config.model.load_precision.bits()
    what = {
        "base": f"base, {config.model.load_precision.mode if bits else str(dtype).removeprefix('torch.')}",
        "adapters": "adapters, float32",
        "optimizer": "optimizer, two moments",
        "gradients": "gradients, at the end of backward",
        "activations": "activations, from forward to backward",
        "logits": "logits, one chunk",
    }
    for name, label in what.items():
        table.add_row(label, *(f"{getattr(need, name) / GB:.3f}" for need in found.values()))
    if context:
        table.add_row("CUDA context, about", *(f"{context / GB:.3f}" for _ in found))
    table.add_section()
    table.add_row("peak (not all at one moment)", *(f"{(need.peak + context) / GB:.3f}" for need in found.values()))
    return table


def _extent(config: Config, examples: Examples, count: int) -> str:
    training = config.training
    sequences = training.max_train_steps * training.batch_size * training.grad_accum_steps
    tokens = sequences * sum(len(example.input_ids) for example in examples.rows) / len(examples)
    packed = f" in {len(examples)} sequences" if config.data.packing else ""
    return (
        f"{training.max_train_steps} steps of {training.batch_size} x {training.grad_accum_steps} | "
        f"about {tokens:,.0f} tokens | {sequences / len(examples):.2f} epochs of {count} rows{packed}"
    )


def _probe(config: Config, output: Path, rows: Sequence[Row], estimate: int) -> str:
    """Some real steps of the last phase, the most expensive one. The first, which compiles and warms up, counts only if
    it has taken so long that there is no other."""
    trainer = Trainer(config, output, rows)
    trainer.model.train()
    trainer.progress.step = config.training.phases[-1].step
    taken: list[float] = []
    windows = trainer.windows(steps=PROBE_STEPS + 1)
    for window in tqdm(windows, desc="probing", total=PROBE_STEPS + 1, unit="step", disable=None, leave=False):
        trainer.enter_phase()
        began = time.perf_counter()
        bool(trainer.train_step(window).skipped)  # waits for the device
        taken.append(time.perf_counter() - began)
        if sum(taken) > PROBE_SECONDS:
            break
    counted = taken[1:] or taken
    seconds = sum(counted) / len(counted)
    left = timedelta(seconds=round(seconds * config.training.max_train_steps))
    measured = ""
    if trainer.model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.model.device)
        measured = f" | peak of these steps {peak / GB:.2f} GB, estimated for the largest batch {estimate / GB:.2f} GB"
    return f"time: {left} at {seconds:.2f} s per step, probed in {len(counted)}{measured}"


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        raise UserError("this system does not say how much memory it has: give --memory-gb N") from None
