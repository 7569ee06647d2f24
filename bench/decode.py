"""Generation with a KV cache: milliseconds a token of a patched model over its base, in turn in one run.

Both write the same number of tokens greedily after the same prompts, with transformers' own ``generate``; the patched
model's experts hold random tensors, so that nothing in it is zero. One row a batch size: the tokens of a forward. The
prompt's forward is timed apart. Peak memory is that of a CUDA device; nothing counts it on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

import molora
from bench import measure, record
from bench.arguments import positive, several


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="base model folder")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 4, 8], help="rows at a time")
    parser.add_argument("--tokens", type=several, default=16, help="written after a prompt of as many; 2 or more")
    parser.add_argument("--lora-r", type=positive, default=32)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the rows with provenance here")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    base, _ = molora.load(options.model, options.device, options.precision)
    patched = molora.inject(copy.deepcopy(base), {"lora_r": options.lora_r, "init_b_std": 0.02}).eval()
    models = {"base": base, "molora": patched}
    rows = []
    for batch in options.batch:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for round_ in range(-1, options.rounds):
            for name, model in models.items():
                took = _generate(model, batch, options.tokens)
                if round_ >= 0:
                    times[name].append(took)
        row: dict[str, Any] = {"batch": batch}
        for i, part in enumerate(("prompt", "token")):
            each = {name: [took[i] for took in rounds] for name, rounds in times.items()}
            ratio, low, high = measure.median_ratio(each["molora"], each["base"])
            row[part] = {
                "ratio": round(ratio, 3),
                "ratio_quartiles": [round(low, 3), round(high, 3)],
                **{f"{name}_ms": round(statistics.median(ms), 2) for name, ms in each.items()},
            }
        if base.device.type == "cuda":
            row["peak_mib"] = {name: _peak_mib(model, batch, options.tokens) for name, model in models.items()}
        rows.append(row)
        for part in ("token", "prompt"):
            of = row[part]
            low, high = of["ratio_quartiles"]
            print(
                f"batch {batch}, {part}: {of['molora_ms']:.2f} ms, base {of['base_ms']:.2f}, "
                f"ratio {of['ratio']:.2f} ({low:.2f} to {high:.2f})"
            )
    if options.json:
        shape = {
            "model": base.config.name_or_path, "dtype": str(base.dtype).removeprefix("torch."),
            "device": base.device.type, "tokens": options.tokens, "lora_r": options.lora_r,
            "weights_mib": {name: _weights_mib(model) for name, model in models.items()},
        }  # fmt: skip
        result = {"op": "decode", "threads": options.threads, "shape": shape, "rounds": options.rounds, "rows": rows}
        record.write(options.json, result)
    return 0


class _Clock(StoppingCriteria):
    """Notes when each token was there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override] # declared with LongTensor
        self.note(input_ids.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def note(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds.append(time.perf_counter())


def _generate(model: PreTrainedModel, batch: int, tokens: int) -> tuple[float, float]:
    """Milliseconds until the first token of ``batch`` rows, and for each that follows."""
    prompt = torch.arange(batch * tokens, device=model.device).view(batch, tokens) % model.config.vocab_size
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
    clock = _Clock()
    generate: Any = model.generate
    clock.note(model.device)
    generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, stopping_criteria=[clock])
    start, first, *_, last = clock.seconds
    return 1e3 * (first - start), 1e3 * (last - first) / (tokens - 1)


def _peak_mib(model: PreTrainedModel, batch: int, tokens: int) -> float:
    """Most MiB that generation holds on a CUDA device beyond what was there before it."""
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    _generate(model, batch, tokens)
    return round((torch.cuda.max_memory_allocated(model.device) - before) / measure.MIB, 1)


def _weights_mib(model: PreTrainedModel) -> float:
    return round(sum(parameter.nbytes for parameter in model.parameters()) / measure.MIB, 1)
