"""The training loop: :meth:`Trainer.train` over :meth:`Trainer.train_step`.

Every count of steps is in optimizer steps. A *window* is the micro-batches of one optimizer step. The gradient of a
window is that of one large batch: losses are sums, divided by the tokens of the whole window.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

import molora_kernels
from molora import (
    adapter,
    chat,
    checkpoint,
    data,
    distributed,
    guard,
    metrics,
    optim,
    packing,
    phases,
    provenance,
    routing,
    trackers,
)
from molora.checkpoint import Progress
from molora.config import Config
from molora.data import Batch, Row
from molora.distributed import World
from molora.errors import UserError
from molora.loss import causal_lm_loss, check_head
from molora.patch import compile_layers, parameter_groups


class Trainer:
    """One run: everything that :meth:`train` needs, opened, checked and, for a resumed run, put back in place.

    ``config`` is resolved (:func:`molora.config.resolve`). With ``resume`` the run goes on from the newest good
    checkpoint in ``output``, if there is one, and ends as if it had never stopped; without, :meth:`train` removes what
    an earlier run left there. Raises :class:`~molora.errors.UserError` for a model, checkpoint or rows that do not fit.
    """

    def __init__(
        self, config: Config, output: Path, rows: Sequence[Row], *, resume: bool = False, world: World | None = None
    ) -> None:
        self.config, self.output = config, output
        self.world = world = world or World()
        if config.training.deterministic:
            world.together(compute_alike)
        world.together(self._take_device)
        self.provenance = provenance.collect(config, world.size)
        self._require_same(world.together(self._choose_kernels))
        start = world.from_first(lambda: checkpoint.newest(output)) if resume else None
        if start is not None:
            world.together(lambda: checkpoint.check_same_run(start, config, self.provenance))

        seed_everything(config.seed)
        self.model, self.tokenizer = world.together(lambda: self._open_model(start))
        self._share_model()
        checkpoint_activations(self.model, config.model.gradient_checkpointing)
        if config.model.compile:
            compile_layers(self.model)
        # Saved with the adapter, so that every program that loads it speaks the format that was trained.
        chat.settle_template(self.tokenizer)
        self.collate = data.Collate(self.tokenizer)
        self.examples, self.held_out = world.together(lambda: self._encode_all(rows))
        self.rows = len(self.examples)
        if config.data.packing:
            self.examples = packing.pack(self.examples, config.data.max_length)
        self.domains = metrics.Domains(span for example in self.examples.rows for span in data.spans(example))
        self.optimizer, self.schedule = optim.build(self.model, config.training)
        self.guard = guard.Guard(self.model, config.training.max_skipped_steps, self._add_spread or World().sum)
        # Where nothing waits for a device, a skipped step is reported without waiting for the next reading.
        self.tells_at_once = self.model.device.type == "cpu"
        self.phase: int | None = None
        self.open: list[tuple[str, nn.Parameter]] = []
        self.progress = Progress()
        if start is not None:
            self.progress = checkpoint.restore(start, self.optimizer, self.schedule)
        self.start, self.resume = start, resume

    def _take_device(self) -> None:
        """Make a GPU this process's own: what asks for the current one, as PyTorch's threads do, gets it."""
        device, place = adapter.pick_device(self.config.device), self.world.local_rank
        if device.type != "cuda":
            return
        if self.world.size > 1 and place >= (count := torch.cuda.device_count()):
            raise UserError(
                f"this machine has {count} GPUs, and a process number {place + 1}: start as many (torchrun "
                "--nproc-per-node), or train with device=cpu"
            )
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)

    def _choose_kernels(self) -> dict[str, Any]:
        """Choose backend and form; returns what else decides which kernels and tiles run here."""
        kernels, device = self.config.kernels, adapter.pick_device(self.config.device)
        try:
            molora_kernels.use_backend(kernels.backend)
            molora_kernels.use_form(kernels.form)
            return molora_kernels.decided_by(device)
        except RuntimeError as error:
            raise UserError(f"kernels.backend: {error}") from error

    def _require_same(self, kernels: dict[str, Any]) -> None:
        """All processes are to compute the same, with the same kernels and tiles, on the same data."""
        same, sources = self.world.require_same, self.provenance
        same("packages", sources["packages"], "install the same versions for all")
        same("config", self.config.model_dump(), "start all with the same preset and the same --set")
        same("data", sources["data"], "give all the same files")
        same(
            "kernels",
            kernels,
            "give all the same kind of device and the same environment (CXX, the C++ compiler, which "
            "kernels.backend=torch does without; TRITON_INTERPRET)",
        )

    def _open_model(self, start: Path | None) -> tuple[PreTrainedModel, Any]:
        # What is to be spread is nowhere whole but in the machine's memory.
        spread = self.world.size > 1 and self.config.training.parallel == "fsdp"
        model, tokenizer = adapter.build(self.config, torch.device("cpu") if spread else None)
        check_head(model)
        if start is not None:
            adapter.load_weights(model, start)
        return model, tokenizer

    def _share_model(self) -> None:
        """Spread the model over the processes, if it is to be: one base, then, not the files of another machine."""
        world, self._add_spread = self.world, None
        if world.size == 1:
            return
        fingerprint = adapter.base_fingerprint(self.model)
        world.require_same("base model", fingerprint, "give all the same files of model_name")
        if self.config.training.parallel == "fsdp":
            self.model.molora_base_fingerprint = fingerprint  # type: ignore[assignment] # a plain attribute
            distributed.shard(self.model, world, adapter.pick_device(self.config.device))
            self._add_spread = world.sum

    def _encode_all(self, rows: Sequence[Row]) -> tuple[data.Examples, data.Examples | None]:
        """What is trained on and, if there are any, what is held out."""
        train_rows, val_rows = data.hold_out(rows, self.config.training.val_size, self.config.seed)
        examples = self._encode(train_rows)
        held_out = self._encode(val_rows, held_out=True) if val_rows else None
        self._check_vocabulary([*examples.rows, *(held_out.rows if held_out else ())])
        return examples, held_out

    def _encode(self, rows: Sequence[Row], *, held_out: bool = False) -> data.Examples:
        settings = self.config.data
        # What the first finds in the cache, or leaves there, the others find; without one, all work at once.
        with self.world.first_on_each_machine() if settings.cache else nullcontext():
            return data.encode_rows(self.tokenizer, rows, settings.max_length, cache=settings.cache, held_out=held_out)

    def _check_vocabulary(self, examples: Sequence[data.Example]) -> None:
        """The tokenizer may be another's: on a GPU an index out of range says nothing of where it came from."""
        rows = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type] # an nn.Embedding
        largest = max(int(example.input_ids.max()) for example in examples)
        if largest >= rows:
            raise UserError(
                f"model_name: the tokenizer gives the token {largest}, and the model {self.config.model_name!r} has "
                f"embeddings for {rows}; give it its own tokenizer"
            )

    def train(self) -> None:
        """Train to ``max_train_steps`` and write ``final``.

        Raises :class:`~molora.errors.UserError` when ``max_skipped_steps`` in a row had a loss or gradient that is
        not finite, and for a full disk.
        """
        training, progress, meter = self.config.training, self.progress, metrics.Meter()
        first = self.world.first
        self.world.together(lambda: trackers.log_in(self.config.logging) if first else None)
        if first and not self.resume:
            checkpoint.clear(self.output)
        if first:
            checkpoint.describe(self.output, self.config, self.provenance)
        self._announce()
        self.model.train()
        with (
            metrics.Log(
                self.output,
                step=progress.step,
                trackers=trackers.opened(self.config, self.output, progress.step) if first else (),
                silent=not first,
            ) as log,
            tqdm(
                total=training.max_train_steps, initial=progress.step, unit="step", disable=None if first else True
            ) as bar,
        ):
            for window in meter.timing(self.windows()):
                self.enter_phase()
                measured = self.train_step(window)
                meter.add(measured)
                bar.update()

                evaluating = self.held_out is not None and self.due(training.val_steps)
                saving = self.due(training.save_steps)
                skipped = self.tells_at_once and bool(measured.skipped)
                if evaluating or saving or skipped or self.due(training.log_steps):
                    self._log_step(log, bar, meter.read(self.progress.step))
                if evaluating:
                    log.write(progress.step, val_loss=self.evaluate())
                if saving:
                    self.save(f"checkpoint-{progress.step}", resumable=True)
                    if first:
                        checkpoint.prune(self.output, training.save_total_limit, progress.step)
                if evaluating or saving:
                    meter.restart_clock()
        self.save(checkpoint.FINAL)
        print(f"finished: {self.output / checkpoint.FINAL}")

    def train_step(self, window: list[Batch]) -> metrics.Measured:
        """Forward, backward and one update over a window; nothing in it waits for the device. Gradients stay until
        the next step.

        The routers' losses depend on how all tokens of a scope chose, so their gradient is injected in backward
        (:mod:`molora.routing`), and the forwards of a scope come before its backwards.
        """
        moe = self.config.moe
        seed_step(self.config.seed, self.world.rank, self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        window = [batch.to(self.model.device) for batch in window]
        mine = [sum(batch.tokens for batch in window), sum(batch.label_tokens for batch in window)]
        counts = torch.tensor(mine, dtype=torch.float64, pin_memory=self.model.device.type == "cuda")
        # From pinned memory, or the host would wait here until the step before is done.
        tokens, label_tokens = self.world.sum(counts.to(self.model.device, non_blocking=True))
        scopes = [window] if moe.load_balance.scope == "step" else [[batch] for batch in window]
        losses: list[Tensor] = []
        router_losses: list[tuple[Tensor, routing.RouterLosses]] = []
        records: list[routing.Record] = []
        domain_counts: list[Tensor] = []
        for scope in scopes:
            forwards = [self._forward(batch, label_tokens) for batch in scope]
            scope_records = [record for record, _ in forwards]
            combined = routing.combine(self.model, scope_records, moe, total_tokens=tokens, add=self.world.sum)
            router_losses.append((combined.tokens / tokens, combined))
            for batch, (record, loss) in zip(scope, forwards, strict=True):
                with routing.using(self.model, record):
                    loss.backward()
                losses.append(loss.detach())
                records.append(record)
                if record.gates is not None:
                    domain_counts.append(record.counts_by(self.domains.of_tokens(batch), len(self.domains.names)))

        lr = float(self.schedule.get_last_lr()[0])
        batch_losses = self.world.stack(torch.stack(losses))
        update = self._update(batch_losses)
        routing.step_bias(self.model, records, moe, update.skipped, add=self.world.sum)
        self.progress.step += 1
        self.progress.rows += sum(len(batch.input_ids) for batch in window) * self.world.size
        return metrics.Measured(
            batch_losses=batch_losses,
            z_loss=torch.stack([share * losses.z_loss for share, losses in router_losses]).sum(),
            load_balance=torch.stack([share * losses.load_balance for share, losses in router_losses]).sum(),
            load=torch.stack([share * losses.load for share, losses in router_losses]).sum(dim=0),
            domain_counts=self.world.sum(torch.stack(domain_counts).sum(0)) if domain_counts else None,
            **update._asdict(),
            tensors=[name for name, _ in self.open],
            where=[batch.where for batch in window],
            lr=lr,
            tokens=tokens,
        )

    def _forward(self, batch: Batch, label_tokens: Tensor) -> tuple[routing.Record, Tensor]:
        """What the routers did, and the batch's share of a window's mean loss over ``label_tokens``."""
        per_domain = self.config.logging.metrics_level == "advanced" and bool(routing.names(self.model))
        record = routing.record(self.model, batch.attention_mask, per_token=per_domain)
        with routing.using(self.model, record):
            loss, _ = causal_lm_loss(self.model, batch)
        return record, loss / label_tokens

    def _update(self, losses: Tensor) -> optim.Update:
        parameters = [parameter for _, parameter in self.open]
        if self._add_spread is None:
            self.world.sum_gradients(parameters)
        limit = self.config.training.max_grad_norm
        update = optim.update(self.optimizer, parameters, losses.sum(), limit, self._add_spread)
        self.schedule.step()
        return update

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss per label token over the held-out rows; a new lowest one is saved as ``checkpoint-best``."""
        assert self.held_out is not None
        self.model.eval()
        world, total = self.world, torch.zeros(2, dtype=torch.float64, device=self.model.device)
        batches = data.batches(self.held_out, self.collate, batch_size=self.config.training.batch_size)
        for of_each in data.windows(batches, world.size):
            mine = world.rank < len(of_each)
            # Where layers are gathered to be computed, all processes must compute as often; some of it counts for none.
            if mine or self._add_spread is not None:
                batch = of_each[world.rank if mine else 0].to(self.model.device)
                with routing.using(self.model, routing.record(self.model, batch.attention_mask)):
                    loss, label_tokens = causal_lm_loss(self.model, batch)
                if mine:
                    total += torch.stack([loss.double(), loss.new_tensor(label_tokens).double()])
        self.model.train()
        loss_sum, count = world.sum(total).tolist()
        mean = loss_sum / count
        if self.progress.best_loss is None or mean < self.progress.best_loss:
            self.progress.best_loss = mean
            self.save(checkpoint.BEST)
        return mean

    def windows(self, steps: int | None = None) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step that is left, or of the first ``steps``, in the run's order."""
        training = self.config.training
        order = data.RunOrder(
            len(self.examples),
            self.config.seed,
            start=self.progress.rows,
            stop=(steps or training.max_train_steps)
            * training.grad_accum_steps
            * training.batch_size
            * self.world.size,
            rank=self.world.rank,
            processes=self.world.size,
        )
        loader = data.batches(
            self.examples,
            self.collate,
            batch_size=training.batch_size,
            order=order,
            num_workers=training.num_workers,
            pin_memory=self.model.device.type == "cuda",
        )
        return data.windows(loader, training.grad_accum_steps)

    def enter_phase(self) -> None:
        """Open and close parameter groups where the next step is the first of its phase."""
        phase = phases.in_force(self.config.training.phases, self.progress.step)
        if phase != self.phase:
            if self.config.model.compile and self.phase is not None:
                # Dynamo of torch 2.11 does not see that a parameter is open now, and its graphs would leave it without
                # a gradient.
                torch.compiler.reset()
            self.phase = phase
            tqdm.write(phases.enter(self.model, self.config.training.phases[phase]))
            groups = parameter_groups(self.model).values()
            self.open = [member for members in groups for member in members if member[1].requires_grad]
            self.guard.enter_phase()

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is to be done after the step just made."""
        step = self.progress.step
        return step == self.config.training.max_train_steps or (every > 0 and step % every == 0)

    def save(self, name: str, *, resumable: bool = False) -> None:
        """Write the folder ``name`` of the output, with training state if a run is to go on from it.

        Raises :class:`~molora.errors.UserError` rather than writing weights that are not finite.
        """
        if broken := guard.not_finite(self.model, self.guard.add):
            raise UserError(
                f"{broken} is not finite at step {self.progress.step}: {name} is not written, older checkpoints "
                "are whole; lower training.lr and train again"
            )
        model, world, state = self.model, self.world, None
        if resumable:
            state = checkpoint.training_state(self.progress, self.optimizer, self.schedule, world)
        weights = distributed.whole(dict(adapter.adapter_tensors(model)), world)
        if world.first:
            checkpoint.save(self.output / name, model, self.tokenizer, self.config, self.provenance, state, weights)

    def _log_step(self, log: metrics.Log, bar: tqdm, interval: metrics.Interval) -> None:
        step, steps = self.progress.step, self.config.training.max_train_steps
        for measured, values in zip(interval.measured, interval.columns, strict=True):
            if values["skipped"]:  # on all processes alike; the rows may be another's
                measured.where[:] = [rows for where in self.world.gather(measured.where) for rows in where]
        findings = self.guard.judge(interval, self.progress)
        values = interval.values()
        routed: dict[str, object] = {}
        if self.config.logging.metrics_level == "advanced":
            load = [[round(share, 4) for share in router] for router in interval.measured[-1].load.tolist()]
            names = routing.names(self.model)
            routed = {"load": dict(zip(names, load, strict=True))}
            if (counts := interval.domain_counts()) is not None:
                routed["domains"] = self.domains.load(counts, names, routing.ledger_of(self.model).top_k)
        seed, rows, skipped = self.config.seed, self.progress.rows, self.progress.skipped
        log.write(step, seed=seed, rows=rows, skipped=skipped, **values, **self._memory(), **routed)
        for at, warning in findings.warnings:
            log.write(at, warning=warning)
            tqdm.write(f"warning: step {at}: {warning}")
        if findings.stop:
            self.world.end(findings.stop)  # all find it
        loss = f"{values['loss']:.4f}" if "loss" in values else "not finite"
        bar.set_postfix(loss=loss, tokens_s=round(values["tokens_per_second"]))
        if bar.disable:  # no terminal to draw on: lines, so that a log file shows where the run is
            left = timedelta(seconds=round((steps - step) * values["seconds_per_step"]))
            speed = f"{values['tokens_per_second']:.0f} tokens/s"
            print(f"step {step}/{steps} | loss {loss} | {speed} | {left} left", flush=True)

    def _memory(self) -> dict[str, float]:
        """The most that tensors have taken of this process's GPU so far, in GB, as ``--preflight`` estimates it."""
        device = self.model.device
        return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}

    def _announce(self) -> None:
        rows = f"{self.rows} rows"
        for count, what in (
            (self.examples.truncated, "truncated"),
            (self.examples.dropped, "dropped: nothing to train"),
        ):
            rows += f", {count} {what}" if count else ""
        if self.config.data.packing:
            tokens = sum(len(example.input_ids) for example in self.examples.rows)
            full = tokens / (len(self.examples) * self.config.data.max_length)
            rows += f" | packed into {len(self.examples)} sequences, {full:.0%} full"
        held_out = f" | {len(self.held_out)} held out" if self.held_out else ""
        goes_on = f" | goes on from {self.start.name}" if self.start else ""
        print(f"{self.output} | {rows}{held_out}{goes_on}", flush=True)


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and every CUDA device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def compute_alike() -> None:
    """From here on in this process PyTorch takes algorithms that give the same bits each time, and refuses others.

    Raises :class:`UserError` where the process has used a GPU already in a way that cannot be made up for.
    """
    wanted = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS may share its memory between streams
    if wanted not in os.environ and torch.cuda.is_initialized():  # cuBLAS reads it once
        raise UserError(
            f"training.deterministic: this process has used the GPU before; set {wanted}=:4096:8 in its environment"
        )
    os.environ.setdefault(wanted, ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers asks it for flash_attention_2
    torch.use_deterministic_algorithms(True)
    # A pass over every new tensor, which finds mistakes and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] # a property of the module


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed torch for one optimizer step of one process. So no two steps and no two processes of a run share dropout
    masks, and a run that goes on, in any number of processes, needs no state of a generator."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0]))


def checkpoint_activations(model: PreTrainedModel, kind: str) -> None:
    """Recompute decoder layers in backward: ``non_reentrant``, ``reentrant``, or ``none``."""
    if kind == "none":
        return
    # transformers 5 renamed the method along the way; the older name warns where the newer exists.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": kind == "reentrant"})
    if kind == "reentrant":
        # The reentrant kind builds a graph only if an input of the layer needs a gradient, and the embedding is frozen.
        model.enable_input_require_grads()
