"""What ``logging.metrics_level: advanced`` costs: time of a training step over that with ``minimal``, in one run.

A real run of the trainer in which both levels take each window in turn, the first of them changing from window to
window, on a tiny random Llama or with ``--preset`` on a real model. Every step is logged (``training.log_steps=1``),
reading back and writing included: a run that logs less often pays less. On a CPU the time is the process's own, of one
thread, since a difference so small is lost in what other programs take.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bench import record, step
from bench.arguments import count, positive
from molora.config import Config, load, resolve
from molora.data import Batch, Row, read_rows
from molora.trainer import Trainer

LEVELS = ("minimal", "advanced")


class Alternating(Trainer):
    """Takes each window at both levels, and the time of each."""

    def windows(self, steps: int | None = None) -> Iterator[list[Batch]]:
        self.seconds: dict[str, list[float]] = {level: [] for level in LEVELS}
        # Every step's reading waits for the device, so that on a GPU the clock on the wall tells the step's time.
        clock = time.process_time if self.model.device.type == "cpu" else time.perf_counter
        half = (steps or self.config.training.max_train_steps) // 2
        for first, window in enumerate(islice(super().windows(steps), half)):
            for level in LEVELS if first % 2 else LEVELS[::-1]:
                logging = self.config.logging.model_copy(update={"metrics_level": level})
                self.config = self.config.model_copy(update={"logging": logging})
                start = clock()
                yield window  # until the loop asks for the next one: the step, its reading and its line in the log
                self.seconds[level].append(clock() - start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", help="a run of molora.train; default: the tiny Llama of `bench step`, 4 x 512 tokens"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="as for molora.train")
    parser.add_argument("--rounds", type=positive, default=35)
    parser.add_argument("--warmup", type=count, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the rows with provenance here")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings, rows = chosen(options, Path(folder))
        trainer = Alternating(settings, Path(folder, "run"), rows)
        trainer.train()
    minimal, advanced = (trainer.seconds[level][options.warmup :] for level in LEVELS)
    ratios = [a / b for a, b in zip(advanced, minimal, strict=True)]
    ratio, (low, high) = statistics.median(ratios), interval(ratios)
    print(f"advanced over minimal: {ratio:.4f}, 95 % interval {low:.4f} to {high:.4f}, median of {len(ratios)} pairs; "
          f"a step takes {statistics.median(minimal):.3f} s")  # fmt: skip
    if options.json:
        record.write(options.json, {"op": "metrics", "ratio": ratio, "interval": [low, high], **trainer.seconds})
    return 0


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the median, by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def chosen(options: argparse.Namespace, folder: Path) -> tuple[Config, list[Row]]:
    """The run's settings and its rows."""
    steps = 2 * (options.rounds + options.warmup)
    fixed = [f"training.max_train_steps={steps}", "training.log_steps=1", "training.save_steps=0", "data.cache=false"]
    fixed.append("training.phases=[{step: 0, trainable: [router, lora, attn_lora]}]")
    if options.preset:
        settings = resolve(load(options.preset, [*options.set, *fixed]))
        assert settings.data.path is not None
        return settings, read_rows(settings.data.path)
    tiny = [f"model_name={tiny_llama(folder / 'model')}", "model.load_precision.mode=fp32", "device=cpu"]
    tiny += ["training.batch_size=4", "data.max_length=512", "data.packing=true"]
    draw = random.Random(0)
    rows: list[Row] = [
        {"text": "".join(draw.choices("abcdefgh ", k=draw.randint(60, 500))), "domain": "general" if i % 2 else "maths"}
        for i in range(400)
    ]  # type: ignore[assignment] # of plain str keys
    return resolve(load(None, [*tiny, *options.set, *fixed])), rows


def tiny_llama(folder: Path) -> Path:
    """A folder with the random Llama of ``bench step`` and a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment] # untyped setter
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment] # likewise
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(step.Shape().config()).save_pretrained(folder)
    return folder
