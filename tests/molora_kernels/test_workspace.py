"""Memory kept from call to call: handed out as a stack, and nothing that leaves a call lies in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from molora_kernels import Projection, Router, mlp_block, use_backend, use_form, workspace
from molora_kernels.grouped_lora.dispatch import Form


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    workspace.release()
    yield
    workspace.release()


def addresses(*tensors: Tensor) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def own_memory() -> int:
    """Where the workspace of this thread begins."""
    with workspace.scope():
        return workspace.empty(torch.zeros(1), 1).untyped_storage().data_ptr()


def test_it_grows_to_the_largest_call_and_is_a_stack() -> None:
    like = torch.zeros(1)
    for size in (100, 10):  # the first finds no memory yet
        with workspace.scope():
            workspace.empty(like, size, 3), workspace.empty(like.half(), size)
    with workspace.scope():
        first = workspace.empty(like, 7).fill_(1.0)
        with workspace.scope():
            inner = workspace.empty(like, 100).fill_(2.0)
        again = workspace.empty(like, 50).fill_(3.0)
        assert (first == 1.0).all() and inner.data_ptr() == again.data_ptr() != first.data_ptr()
        assert len(addresses(first, inner, again)) == 1 and again.data_ptr() % 64 == 0
        too_large = workspace.empty(like, 10_000)
        assert not addresses(too_large) & addresses(first)
    assert own_memory() != first.untyped_storage().data_ptr()  # grown since


def test_an_error_gives_back_what_was_taken() -> None:
    with pytest.raises(ZeroDivisionError), workspace.scope():
        workspace.empty(torch.zeros(1), 1000)
        raise ZeroDivisionError
    with workspace.scope():
        once = workspace.empty(torch.zeros(1), 1000)
    with workspace.scope():
        assert workspace.empty(torch.zeros(1), 1000).data_ptr() == once.data_ptr()


def test_threads_have_their_own() -> None:
    with workspace.scope():
        workspace.empty(torch.zeros(1), 100)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(own_memory()))
    thread.start()
    thread.join()
    assert seen[0] != own_memory()


@pytest.mark.parametrize("routers", [1, 3])
@pytest.mark.parametrize("form", ["dense", "grouped"])
def test_nothing_that_leaves_the_block_lies_in_it(form: Form, routers: int) -> None:
    torch.manual_seed(0)
    shapes = ((24, 16), (24, 16), (16, 24))
    projections = [Projection(torch.randn(n, k), torch.randn(8, k), torch.randn(n, 8)) for n, k in shapes]
    chosen = [Router(torch.randn(4, k)) for _, k in shapes][:routers]
    x = torch.randn(20, 16, requires_grad=True)
    leaves = [x, *(t.requires_grad_() for p in projections for t in (p.lora_a, p.lora_b)), *(r.weight for r in chosen)]
    for router in chosen:
        router.weight.requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with use_backend("torch"), use_form(form):
        for _ in range(2):  # in the first call the workspace is still empty
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = mlp_block(
                    x, *projections, chosen, top_k=2, scaling=2.0, dropout_p=0.1, dropout_seed=torch.tensor(1)
                )
            left = (out.y, out.sums, out.counts, *out.gates, *torch.autograd.grad(out.y, leaves, torch.randn(20, 16)))
            memory = own_memory()
            assert memory not in addresses(*left, *saved)
