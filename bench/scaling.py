"""``python -m bench.scaling``: memory and bytes of the recipe on 1 to 1,024 GPUs, from formulas (docs/scaling.md)."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


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
    print(table())
