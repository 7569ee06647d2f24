"""``python -m bench.scaling``: the recipe on 1 to 1,024 GPUs, from formulas: memory, bytes, time (docs/scaling.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bench.report import RESULTS

GB = 1e9
MEASURED = RESULTS / "step-cuda-bf16-stage2-checkpointing.json"
"""Micro-batches of the recipe on one GPU; where this result is there, time is worked out from it."""


@dataclass(frozen=True)
class Shape:
    """A Llama: what decides how many parameters it has."""

    layers: int
    hidden: int
    intermediate: int
    kv: int
    """Output features of k_proj and v_proj."""
    vocabulary: int
    tied: bool


MODELS = {
    "3B": Shape(28, 3072, 8192, 1024, 128256, True),
    "8B": Shape(32, 4096, 14336, 1024, 128256, False),
    "70B": Shape(80, 8192, 28672, 1024, 128256, False),
}
EXPERTS, RANK = 4, 32
ROWS, TOKENS, MICRO_BATCHES = 8, 1024, 2


def layer_base(m: Shape) -> int:
    """Parameters of one decoder layer: q, o, k, v, the MLP and two norms."""
    return 2 * m.hidden**2 + 2 * m.hidden * m.kv + 3 * m.hidden * m.intermediate + 2 * m.hidden


def layer_adapters(m: Shape) -> int:
    """Experts and routers on the MLP, one plain LoRA on each attention projection."""
    mlp = 3 * EXPERTS * RANK * (m.hidden + m.intermediate) + EXPERTS * (2 * m.hidden + m.intermediate + 3)
    return mlp + RANK * (2 * 2 * m.hidden + 2 * (m.hidden + m.kv))


def words(m: Shape) -> int:
    """Parameters of the embedding, or of the head."""
    return m.vocabulary * m.hidden


def base(m: Shape) -> int:
    return m.layers * layer_base(m) + words(m) * (1 if m.tied else 2) + m.hidden


def memory(m: Shape, gpus: int, parallel: str) -> float:
    """Bytes on each GPU: bf16 base; fp32 adapters, gradients and two moments; the hidden states that recomputing
    layers keeps of all micro-batches. Beside it: one layer's activations, one chunk of logits, the CUDA context."""
    adapters = m.layers * layer_adapters(m)
    static = 2 * base(m) + 16 * adapters
    hidden = 2 * m.layers * MICRO_BATCHES * ROWS * TOKENS * m.hidden
    if parallel == "ddp" or gpus == 1:
        return static + hidden
    gathered = 2 * (2 * layer_base(m) + 4 * layer_adapters(m)) + 2 * words(m)  # a layer, the next, and the head
    return static / gpus + gathered + hidden


def sent(m: Shape, gpus: int, parallel: str) -> float:
    """Bytes that each GPU sends in a step, by rings."""
    ring, adapters = (gpus - 1) / gpus, m.layers * layer_adapters(m)
    if parallel == "ddp":
        return 2 * ring * 4 * adapters
    layers = 2 * m.layers * layer_base(m) + 4 * adapters
    # Layers are gathered in forward and in backward, embedding and head once each; gradients leave in each backward.
    return ring * MICRO_BATCHES * (2 * layers + 2 * 2 * words(m) + 4 * adapters)


@dataclass(frozen=True)
class Device:
    """Rates of a data sheet."""

    name: str
    flops: float
    """A second, dense, 16 bits."""
    inside: float
    """Bytes a second that a GPU sends to the seven others of its machine."""
    outside: float
    """And to other machines."""

    def sending(self, gpus: int) -> float:
        return self.inside if gpus <= 8 else self.outside


H100 = Device("H100 SXM", 989e12, 450e9, 50e9)


def flops(m: Shape) -> float:
    """Arithmetic of one GPU's step. Frozen linears: forward, again in backward, and the gradient of their input;
    experts (all E of them, the dense form) and LoRA their weights' gradient besides; causal attention a forward,
    again, and twice that in backward; head and its gradient for every token, labels or not."""
    tokens = MICRO_BATCHES * ROWS * TOKENS
    layer = 6 * layer_base(m) + 8 * layer_adapters(m) + 4 * 2 * TOKENS * m.hidden
    return tokens * (m.layers * layer + 4 * words(m))


def rate(result: dict[str, Any]) -> float:
    """FLOP/s of a step of ``python -m bench step`` with these micro-batches of the 3B base."""
    shape = result["shape"]
    if (shape["model"], shape["rows"], shape["length"]) != ("llama3.2-3b", ROWS, TOKENS):
        raise ValueError(f"a step of {shape}, not of the recipe's micro-batch")
    (row,) = (row for row in result["rows"] if row["variant"] == "molora")
    return flops(MODELS["3B"]) / (1e-3 * (MICRO_BATCHES * row["total_ms"] + row["update_ms"]))


def seconds(m: Shape, gpus: int, parallel: str, device: Device, flop_rate: float) -> tuple[float, float]:
    """Of a step: with all sending hidden behind computing, and with none. ``ddp`` sends after the last backward."""
    computing, sending = flops(m) / flop_rate, sent(m, gpus, parallel) / device.sending(gpus)
    return computing + sending if parallel == "ddp" else max(computing, sending), computing + sending


def times(device: Device = H100) -> str:
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else None
    flop_rate = rate(measured) if measured else device.flops
    lines = [
        f"Computing at {flop_rate / 1e12:,.0f} TFLOP/s "
        + (f"(measured: {measured['provenance']['gpu']})" if measured else f"({device.name}'s data sheet)"),
        "",
        "| base | GPUs | ddp: s a step | fsdp: s a step, gathers hidden | none hidden | ddp: rows a second | fsdp |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, m in MODELS.items():
        for gpus in (1, 2, 8, 64, 1024):
            (ddp, _), (least, most) = (seconds(m, gpus, p, device, flop_rate) for p in ("ddp", "fsdp"))
            rows = [f"{gpus * MICRO_BATCHES * ROWS / s:,.0f}" for s in (ddp, least)]
            lines.append(f"| {name} | {gpus:,} | {ddp:.2f} | {least:.2f} | {most:.2f} | {rows[0]} | {rows[1]} |")
    return "\n".join(lines)


def table() -> str:
    lines = [
        "| base | GPUs | ddp: GB on each | ddp: GB sent a step | fsdp: GB on each | fsdp: GB sent a step |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, m in MODELS.items():
        for gpus in (1, 2, 8, 64, 1024):
            cells = [f"{f(m, gpus, p) / GB:.2f}" for p in ("ddp", "fsdp") for f in (memory, sent)]
            lines.append(f"| {name} | {gpus:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), times(), sep="\n\n")
