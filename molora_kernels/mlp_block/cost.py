"""FLOPs and bytes of the SwiGLU block from its shapes: two grouped LoRAs and the elementwise pass between them."""

from __future__ import annotations

from typing import Any

from molora_kernels.grouped_lora import cost
from molora_kernels.grouped_lora.cost import Cost


def forward(
    T: int,
    K: int,
    inner: int,
    R: int,
    *,
    heads: int = 0,
    experts: int = 1,
    itemsize: int = 2,
    top_k: int | None = None,
) -> Cost:
    """For T tokens, K hidden and ``inner`` intermediate features, R = E * r, and 0, 1 or 3 routers. ``top_k``: of the
    grouped form, whose routers read their inputs for themselves; None: of the dense one."""
    sizes: dict[str, Any] = dict(experts=experts, itemsize=itemsize, top_k=top_k)
    gate_up = cost.forward(T, K, (inner, inner), 2 * R, heads=min(heads, 2), **sizes)
    down = cost.forward(T, inner, (K,), R, heads=min(heads, 1), **sizes)
    routers = 0 if top_k is None else T * (K * (heads > 0) + inner * (heads == 3))
    return _sum(gate_up, down, swiglu_bytes=3 * T * inner * itemsize, router_bytes=routers * itemsize)


def backward(
    T: int,
    K: int,
    inner: int,
    R: int,
    *,
    heads: int = 0,
    experts: int = 1,
    itemsize: int = 2,
    top_k: int | None = None,
    need_dx: bool = True,
    need_dlora: bool = True,
) -> Cost:
    """As :func:`forward`; routers train. The gradient of h is always needed: gate's and up's come through it."""
    sizes: dict[str, Any] = dict(experts=experts, itemsize=itemsize, top_k=top_k)
    gate_up = cost.backward(
        T, K, (inner, inner), 2 * R, heads=min(heads, 2), need_dx=need_dx, need_dlora=need_dlora, **sizes
    )
    down = cost.backward(T, inner, (K,), R, heads=min(heads, 1), need_dlora=need_dlora, **sizes)
    # The grouped form's routers read their input for their weights' gradient, and begin dx, to which experts then add.
    routers = 0 if top_k is None else T * (K * (heads > 0) * (1 + 2 * need_dx) + inner * (heads == 3) * 3)
    return _sum(gate_up, down, swiglu_bytes=(5 + need_dlora) * T * inner * itemsize, router_bytes=routers * itemsize)


def _sum(gate_up: Cost, down: Cost, *, swiglu_bytes: int, router_bytes: int) -> Cost:
    base_flops, adapter_flops, base_bytes, adapter_bytes = (a + b for a, b in zip(gate_up, down, strict=True))
    return Cost(base_flops, adapter_flops, base_bytes + swiglu_bytes, adapter_bytes + router_bytes)
