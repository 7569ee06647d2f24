"""Generation with a KV cache: milliseconds a token of a patched model over its base, in turn in one run.

Both write the same number of tokens greedily from the same prompts, with transformers' own ``generate``; the patched
model's experts hold random tensors, so that nothing in it is zero. One row a batch size: the tokens of a forward.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

import molora
from bench import record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="base model folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], help="rows at a time")
    parser.add_argument("--tokens", type=int, default=16, help="written after a prompt of as many")
    parser.add_argument("--lora-r", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the rows with provenance here")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    base, _ = molora.load(options.model, options.device, options.precision)
    patched = molora.inject(copy.deepcopy(base), {"lora_r": options.lora_r, "init_b_std": 0.02}).eval()
    rows = []
    for batch in options.batch:
        times: dict[str, list[float]] = {"base": [], "molora": []}
        for round_ in range(-1, options.rounds):
            for name, model in (("base", base), ("molora", patched)):
                took = _generate(model, batch, options.tokens)
                if round_ >= 0:
                    times[name].append(1e3 * took / options.tokens)
        ratios = [m / b for m, b in zip(times["molora"], times["base"], strict=True)]
        row: dict[str, Any] = {"batch": batch, "ratio": statistics.median(ratios), "ratios": sorted(ratios)}
        row |= {f"{name}_ms": statistics.median(each) for name, each in times.items()}
        rows.append(row)
        print(
            f"batch {batch}: {row['molora_ms']:.2f} ms a token, base {row['base_ms']:.2f}, ratio {row['ratio']:.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if options.json:
        dtype = str(base.dtype).removeprefix("torch.")
        shape = {"tokens": options.tokens, "lora_r": options.lora_r, "threads": options.threads, "dtype": dtype}
        record.write(options.json, {"op": "decode", **shape, "rows": rows})
    return 0


def _generate(model: PreTrainedModel, batch: int, tokens: int) -> float:
    """Seconds for ``tokens`` tokens of ``batch`` rows, their prompts read before."""
    prompt = torch.arange(batch * tokens, device=model.device).view(batch, tokens) % model.config.vocab_size
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
    generate: Any = model.generate
    _synchronize(model)
    start = time.perf_counter()
    generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    _synchronize(model)
    return time.perf_counter() - start


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
