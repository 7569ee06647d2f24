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
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is held, by tests of other files neither."""
    monkeypatch.setattr(workspace, "_kept", workspace._Kept())
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


def test_lasting_memory_comes_back_when_the_last_view_is_gone() -> None:
    like = torch.zeros(1)
    first = workspace.lasting(like, 1024, 512).fill_(1.0)
    where, view = first.data_ptr(), first[3:].T
    del first
    second = workspace.lasting(like, 1024, 512).fill_(2.0)
    assert second.data_ptr() != where and (view == 1.0).all()
    del view
    third = workspace.lasting(like, 900, 512)  # what fits with less than a fifth to spare is used again
    assert third.data_ptr() == where and workspace.lasting(like, 100, 512).data_ptr() != where
    assert third.shape == (900, 512) and third.dtype == torch.float32 and third.is_contiguous()


def test_lasting_memory_is_held_by_a_graph_until_backward() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            kept = workspace.lasting(x, *x.shape).copy_(x)
            ctx.where = kept.data_ptr()
            ctx.save_for_backward(kept)
            return kept.square()

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:
            return 2 * dy * ctx.saved_tensors[0]

    x = torch.randn(1024, 512, requires_grad=True)
    y = Square.apply(x)
    where = y.grad_fn.where
    other = workspace.lasting(x, *x.shape).fill_(0.0)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert torch.equal(dx, 2 * x.detach()) and other.data_ptr() != where
    assert workspace.lasting(x, *x.shape).data_ptr() == where


@pytest.mark.parametrize("form", ["dense", "grouped"])
def test_lasting_results_may_be_changed_in_place(form: Form) -> None:
    """As a linear's may, whatever their size: a residual is often added so."""
    x = torch.randn(1024, 256, requires_grad=True)
    projections = [Projection(torch.randn(256, 256), torch.randn(8, 256), torch.randn(256, 8)) for _ in range(3)]
    with use_backend("torch"), use_form(form):
        y = mlp_block(x, *projections, [Router(torch.randn(4, 256))], top_k=1, scaling=2.0).y
        before, dy = y.detach().clone(), torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        y += x
        (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, before + x) and torch.equal(dx, expected + dy)


def test_lasting_memory_comes_back_from_any_thread() -> None:
    held = [workspace.lasting(torch.zeros(1), 1024, 512)]
    where = held[0].data_ptr()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert workspace.lasting(torch.zeros(1), 1024, 512).data_ptr() == where


def test_lasting_memory_is_a_quarter_more_than_was_in_use_at_once_at_most() -> None:
    like, kept, most = torch.zeros(1), workspace._kept, 0
    for sizes in ((2000,), (1000, 1900), (700,), (2500, 900), (5000,), (4100, 900), (1200, 1201, 1202), (5001,), (4,)):
        tensors = [workspace.lasting(like, rows, 512) for rows in sizes]
        most = max(most, sum(t.numel() * 4 for t in tensors))
        assert kept.used + sum(map(len, kept.free)) <= 1.25 * most
        del tensors
    before = kept.used
    little = workspace.lasting(like, 4)  # is the allocator's
    assert little.numel() == 4 and kept.used == before
