"""Both stages of the recipe at their own size, on a base of random weights: do they run here, how fast, in what memory?

Nothing is fetched: neither Llama's weights nor data, of which the rows are random words, every one as long as the stage
takes them, so that each step is the largest there can be. Each stage is ``python -m molora.train`` with its preset, in
a process of its own: stage 1 changes its phase half-way, stage 2 goes on from stage 1's final adapter. Losses say
nothing. Times are of the second half of the steps, when everything trains and nothing is compiled any more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench import record, step
from bench.arguments import Mistake, device, positive, several
from molora import checkpoint, config, metrics

STAGES = {
    "stage 1": ("llama3.2_3b_mixture_lora_sft", 10, 512),
    "stage 2": ("llama3.2_3b_mixture_lora_sft_cot", 8, 1024),
}
"""stage -> preset, rows of a micro-batch, tokens of a row: as the README's commands have them."""

WORDS = [f"w{i}" for i in range(500)]
SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
AROUND = 5
"""Tokens of a row that are not of its answer: the question's one word, and what the template puts around both."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(step.MODELS), default="llama3.2-3b")
    parser.add_argument("--steps", type=several, default=4, help="optimizer steps of a stage, 2 or more")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--folder", metavar="DIR", help="for the base and the runs, 10 GB (default: a temporary one)")
    parser.add_argument("--set", metavar="KEY.PATH=VALUE", action="append", default=[], help="of both stages' presets")
    parser.add_argument("--json", metavar="FILE", help="write the rows with provenance here")


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="molora-recipe-") as folder:
        rows = measured(options, Path(folder))
    for row in rows:
        memory = "".join(
            f", {name} {row[key]:.2f} GB"
            for key, name in (("peak_memory_gb", "on the GPU at most"), ("resident_gb", "of the host at most"))
            if key in row
        )
        print(
            f"{row['variant']}: {row['seconds_per_step']:.2f} s a step of {row['tokens_per_step']:,} tokens, "
            f"{row['tokens_per_second']:,.0f} tokens/s{memory}; {row['other_seconds']:.0f} s to start and to save"
        )
    if options.json:
        shape = {"model": options.model, "device": options.device, "steps": options.steps, "set": options.set}
        record.write(options.json, {"op": "recipe", "threads": options.threads, "shape": shape, "rows": rows})
    return 0


def measured(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each stage."""
    model: Path = folder / "base"
    make_base(options.model, model, options.device)
    rows = []
    for stage, (preset, size, length) in STAGES.items():
        overrides = [
            f"model_name={json.dumps(str(model))}", f"device={options.device}", f"data.path={folder}/{preset}.jsonl",
            f"data.max_length={length}", "data.cache=false", f"training.batch_size={size}",
            "training.step_unit=optimizer", f"training.max_train_steps={options.steps}", "training.log_steps=1",
            *options.set,
        ]  # fmt: skip
        given = config.load(config.presets_folder() / "reasoning" / f"{preset}.yml", overrides)
        overrides += [f"training.phases.{i}.step={options.steps // 2}" for i in range(1, len(given.training.phases))]
        make_rows(folder / f"{preset}.jsonl", size * given.training.grad_accum_steps * options.steps, length)
        rows.append({"variant": stage, **_train(stage, preset, overrides, folder / preset, options.threads)})
        model = folder / preset / checkpoint.FINAL
    return rows


def make_base(name: str, folder: Path, where: str = "cpu") -> None:
    """A Llama of random weights in bf16, drawn on the device ``where``, with a token for each word."""
    base = step.base_model(step.Shape(model=name, length=4096, dtype="bf16", device=where))
    base.save_pretrained(folder)
    del base
    if where != "cpu":
        torch.cuda.empty_cache()
    known = {token: i for i, token in enumerate([*SPECIAL, "<|unknown|>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=SPECIAL)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_rows(path: Path, count: int, length: int) -> None:
    """Rows of exactly ``length`` tokens."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            question, *answer = draw.choices(WORDS, k=1 + length - AROUND)
            file.write(json.dumps({"prompt": question, "response": " ".join(answer)}) + "\n")


def _train(stage: str, preset: str, overrides: list[str], output: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "molora.train", "--preset", preset, "--output-dir", str(output)]
    command += [part for value in overrides for part in ("--set", value)]
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    _, status, usage = os.wait4(process.pid, 0)  # unlike wait(), it tells what this child took
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Mistake(f"{stage}: python -m molora.train ended with {process.returncode}, see above")
    lines = [line for line in metrics.read(output / metrics.FILE) if "seconds_per_step" in line]
    timed = lines[len(lines) // 2 :]
    seconds = statistics.median(line["seconds_per_step"] for line in timed)
    tokens = round(statistics.median(line["tokens_per_second"] * line["seconds_per_step"] for line in timed))
    found = {
        "seconds_per_step": round(seconds, 3),
        "seconds_of_each": [round(line["seconds_per_step"], 3) for line in lines],
        "tokens_per_step": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "other_seconds": round(time.perf_counter() - began - sum(line["seconds_per_step"] for line in lines), 1),
        "resident_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }
    if "peak_memory_gb" in lines[-1]:
        found["peak_memory_gb"] = round(lines[-1]["peak_memory_gb"], 2)
    return found
