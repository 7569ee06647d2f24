"""FLOPs and bytes of the SwiGLU block from its shapes: two grouped LoRAs and the elementwise pass between them."""

from __future__ import annotations

from molora_kernels.grouped_lora import cost
from molora_kernels.grouped_lora.cost import Cost


def forward(T: int, K: int, inner: int, R: int, *, heads: int = 0, experts: int = 1, itemsize: int = 2) -> Cost:
    """For T tokens, K hidden and ``inner`` intermediate features, R = E * r, and 0, 1 or 3 routers."""
    gate_up = cost.forward(T, K, (inner, inner), 2 * R, heads=min(heads, 2), experts=experts, itemsize=itemsize)
    down = cost.forward(T, inner, (K,), R, heads=min(heads, 1), experts=experts, itemsize=itemsize)
    return _sum(gate_up, down, swiglu_bytes=3 * T * inner * itemsize)


def backward(
    T: int,
    K: int,
    inner: int,
    R: int,
    *,
    heads: int = 0,
    experts: int = 1,
    itemsize: int = 2,
    need_dx: bool = True,
    need_dlora: bool = True,
) -> Cost:
    """As :func:`forward`. The gradient of h is always needed: gate's and up's gradients come through it."""
    gate_up = cost.backward(
        T, K, (inner, inner), 2 * R, heads=min(heads, 2), experts=experts, itemsize=itemsize,
        need_dx=need_dx, need_dlora=need_dlora,
    )  # fmt: skip
    down = cost.backward(
        T, inner, (K,), R, heads=min(heads, 1), experts=experts, itemsize=itemsize, need_dlora=need_dlora
    )
    return _sum(gate_up, down, swiglu_bytes=(5 + need_dlora) * T * inner * itemsize)


def _sum(gate_up: Cost, down: Cost, *, swiglu_bytes: int) -> Cost:
    base_flops, adapter_flops, base_bytes, adapter_bytes = (a + b for a, b in zip(gate_up, down, strict=True))
    return Cost(base_flops, adapter_flops, base_bytes + swiglu_bytes, adapter_bytes)
