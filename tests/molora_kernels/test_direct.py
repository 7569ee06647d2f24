"""Plain calls pass the dispatcher by; whoever listens there hears the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import molora_kernels as mk


class Heard(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def block(draw: torch.Generator) -> tuple[list[Tensor], Any]:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    leaves = [
        normal(5, 8),
        *(normal(*s) for s in ((4, 8), (6, 4), (4, 8), (6, 4), (4, 6), (8, 4), (2, 8), (2, 8), (2, 6))),
    ]
    weights = [normal(*s) for s in ((6, 8), (6, 8), (8, 6))]

    def forward(x: Tensor, *adapters: Tensor) -> Tensor:
        gate, up, down = (mk.Projection(w, adapters[2 * i], adapters[2 * i + 1]) for i, w in enumerate(weights))
        out = mk.mlp_block(x, gate, up, down, [mk.Router(w) for w in adapters[6:]], top_k=1, scaling=2.0)
        return out.y.sum(dim=-1) + out.sums.sum()

    return leaves, forward


def grads(leaves: list[Tensor], forward: Any, dy: Tensor) -> list[Tensor]:
    taken = [leaf.clone().requires_grad_() for leaf in leaves]
    y = forward(*taken)
    return [y.detach(), *torch.autograd.grad(y, taken, dy)]


def test_both_ways_are_one_computation() -> None:
    draw = torch.Generator().manual_seed(0)
    leaves, forward = block(draw)
    dy = torch.randn(5, generator=draw)
    plain = grads(leaves, forward, dy)
    with Heard() as heard:
        listened = grads(leaves, forward, dy)
    assert {"molora.mlp_block_fwd.default", "molora.mlp_block_bwd.default"} <= set(heard.names)
    assert all(torch.equal(a, b) for a, b in zip(plain, listened, strict=True))


def test_a_plain_call_has_one_node_of_its_own() -> None:
    leaves, forward = block(torch.Generator().manual_seed(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        forward(*(leaf.requires_grad_() for leaf in leaves))
    assert not any("mlp_block_fwd" in event.key for event in profile.key_averages())


def test_a_trace_holds_the_operator() -> None:
    leaves, forward = block(torch.Generator().manual_seed(0))
    with mk.use_backend("torch"):
        traced = torch.jit.trace(lambda x: forward(x, *leaves[1:]), (leaves[0],), check_trace=False)
        assert "molora::mlp_block_fwd" in str(traced.graph)
        assert torch.equal(traced(leaves[0]), forward(*leaves))


def test_a_graph_made_before_dispatch_holds_the_operator() -> None:
    leaves, forward = block(torch.Generator().manual_seed(0))
    made = make_fx(lambda x: forward(x, *leaves[1:]), pre_dispatch=True)(leaves[0])
    assert "mlp_block_fwd" in made.code and torch.equal(made(leaves[0]), forward(*leaves))


def test_what_does_not_train_gets_no_gradient() -> None:
    leaves, forward = block(torch.Generator().manual_seed(0))
    adapter = leaves[1].requires_grad_()
    y = forward(*leaves)
    (da,) = torch.autograd.grad(y, [adapter], torch.randn(5, generator=torch.Generator().manual_seed(1)))
    assert da.shape == adapter.shape and da.abs().sum() > 0
    with torch.no_grad():
        assert not forward(*leaves).requires_grad


def test_a_forward_mode_derivative_is_refused() -> None:
    """torch.library would give zeros."""
    leaves, forward = block(torch.Generator().manual_seed(0))
    of_x = lambda x: forward(x, *leaves[1:])  # noqa: E731 # a function of x alone, as jvp wants it
    with pytest.raises(NotImplementedError, match="use_backend"):
        torch.func.jvp(of_x, (leaves[0],), (torch.ones_like(leaves[0]),))
    with mk.use_backend("reference"):
        assert torch.func.jvp(of_x, (leaves[0],), (torch.ones_like(leaves[0]),))[1].abs().sum() > 0


def test_a_second_derivative_is_refused() -> None:
    leaves, forward = block(torch.Generator().manual_seed(0))
    x = leaves[0].requires_grad_()
    dy = torch.randn(5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (dx,) = torch.autograd.grad(forward(x, *leaves[1:]), [x], dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(dx, torch.randn(dx.shape, generator=torch.Generator().manual_seed(2)))
