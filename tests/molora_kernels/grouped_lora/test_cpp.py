"""The grouped form's C++ kernels: each product against its definition, over tiles' edges, and what they must not do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from molora_kernels import backend, use_backend, workspace
from molora_kernels.dropout import Dropout
from molora_kernels.grouped_lora import cpp, order

pytestmark = pytest.mark.skipif(not backend.compiler_installed(), reason="there is no C++ compiler here")

SIZES = [  # tokens, features, experts, top_k, rank
    (1, 3, 2, 1, 1),
    (7, 64, 4, 2, 8),
    (130, 65, 3, 2, 5),  # odd in everything
    (700, 200, 4, 2, 32),  # several blocks of rows in a group
    (401, 450, 3, 2, 72),  # several panels, and a group's columns are more than a tile's
    (90, 40, 4, 4, 16),  # all experts chosen
    (150, 70, 8, 3, 16),  # by expert: more sets than are kept apart
    (40, 33, 64, 8, 4),
]
FP32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _inductor() -> Iterator[None]:
    with use_backend("inductor"):
        yield


def gates_of(tokens: int, experts: int, top_k: int, idle: bool = False) -> Tensor:
    gates = torch.rand(tokens, experts) + 0.1
    if idle and top_k < experts:
        gates[:, -1] = 0.0
    return gates.where(gates.argsort(-1, descending=True).argsort(-1) < top_k, 0.0)


def rows_apart(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A matrix whose rows lie apart, and all that it lies in."""
    whole = torch.randn(rows, columns + 9).to(dtype)
    return whole[:, 4 : 4 + columns], whole


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize(("tokens", "features", "experts", "top_k", "rank"), SIZES)
def test_tokens_are_grouped_as_they_are_in_python(
    tokens: int, features: int, experts: int, top_k: int, rank: int, idle: bool
) -> None:
    torch.manual_seed(tokens)
    gates = torch.stack([gates_of(tokens, experts, top_k, idle) for _ in range(2)], dim=1)
    gates[tokens // 2 :, 1, : experts // 2] = 0.0  # as chosen gates do that underflow
    found = cpp.orders_of(gates, 2, top_k)
    assert found.table is not None
    for head, row in enumerate(found.table):
        expected = order.order_of(gates[:, head], top_k)
        count, starts, of_groups, visits = row.split([1, found.most + 1, found.most * found.chosen, found.visits])
        groups = int(count)
        assert found.once == expected.by_set and groups == len(expected.groups)
        assert torch.equal(visits, expected.tokens)
        assert starts[: groups + 1].diff().tolist() == expected.sizes
        assert of_groups.view(-1, found.chosen)[:groups].tolist() == expected.groups


@pytest.mark.parametrize("heads", [2, 1, 0])
@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "features", "experts", "top_k", "rank"), SIZES)
def test_each_product_is_its_definition_and_nothing_else_is_written(
    tokens: int, features: int, experts: int, top_k: int, rank: int, dtype: torch.dtype, heads: int
) -> None:
    """Two projections that have gates of their own, the same, or none."""
    torch.manual_seed(tokens)
    if not heads:
        experts, top_k = 1, 1
    K, Ns, R, Q = features, (features + 5, 34), experts * rank, 6
    x, *dys = (rows_apart(tokens, F, dtype)[0] for F in (K, *Ns))
    a, b = [torch.randn(R, K) for _ in Ns], [torch.randn(N, R) for N in Ns]
    others, w_others = torch.randn(tokens, Q), torch.randn(Q, K)
    gates = torch.stack([gates_of(tokens, experts, top_k) for _ in range(heads)], dim=1) if heads else None
    orders = cpp.orders_of(gates, 2, top_k)
    # Everything in fp64, in a matrix of all experts' columns, of which a visit has its own.
    own_gates = [torch.ones(tokens, 1)] * 2 if gates is None else [gates[:, min(g, heads - 1)] for g in range(2)]
    c = [2.0 * own.repeat_interleave(rank, 1) for own in own_gates]
    at = []
    for own in own_gates:
        ordered = order.order_of(own, top_k)
        at.append((ordered.tokens[:, None], (ordered.experts[:, :, None] * rank + torch.arange(rank)).flatten(1)))

    def spread(visits: Tensor) -> list[Tensor]:
        """(T, R) of each projection."""
        found = list(visits.double().view(2, *at[0][1].shape)) if heads else list(visits.double().chunk(2, dim=1))
        return [torch.zeros(tokens, R, dtype=torch.float64).index_put_(*own) for own in zip(at, found, strict=True)]

    def near(actual: Tensor, product: Callable[[Callable[[Tensor], Tensor]], Tensor], once: bool = True) -> None:
        """Each sum errs by a few roundings of the sum of its terms' magnitudes, of which up to three factors may have
        been rounded to bf16; and is rounded to its dtype: once, or on the way too."""
        exact, magnitude = product(Tensor.double), product(lambda t: t.double().abs())
        error, rounded = (actual.double() - exact).abs(), exact.abs() if once else magnitude
        of_sum = 8 * FP32 + (1.5 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0)
        assert (error <= of_sum * magnitude + torch.finfo(actual.dtype).eps * rounded).all(), error.max()

    ys, s = cpp.forward(x, [], [], a, b, gates, None, 2.0, 0.0, 0, top_k)
    chosen = [(own != 0).double() for own in c]
    for g, (y, own_s) in enumerate(zip(ys, spread(s), strict=True)):
        near(own_s.to(dtype), lambda f: f(x) @ f(a[g]).T * chosen[g])  # noqa: B023 # called at once
        near(y, lambda f: f(x) @ f(a[g]).T * f(c[g]) @ f(b[g]).T, orders.once)  # noqa: B023 # called at once

    s = torch.randn(s.shape).to(dtype)
    saved = spread(s)
    with workspace.scope():
        ds, db, dgates = cpp.to_shrink(dys, b, gates, s, 2.0, True, True, orders=orders)
        for g, own_ds in enumerate(spread(ds)):
            near(own_ds.float(), lambda f: f(dys[g]) @ f(b[g]) * f(c[g]))  # noqa: B023 # called at once
            near(db[g], lambda f: f(dys[g]).T @ (f(c[g]) * f(saved[g])))  # noqa: B023 # called at once

        for head in range(heads):
            own = range(2) if heads == 1 else [head]

            def of_head(f: Callable[[Tensor], Tensor], own: Iterable[int] = own) -> Tensor:
                products = torch.stack([f(dys[g]) @ f(b[g]) * f(saved[g]) for g in own])
                return 2.0 * products.sum(0).view(tokens, experts, rank).sum(-1)

            near(dgates[:, head], of_head)

        out, around = rows_apart(tokens, K, dtype)
        before, own_ds, dropout = around.clone(), spread(ds), Dropout(None, 0.0, 0)
        cpp.to_input(dys, [], a, ds, dropout, out, others, w_others, orders=orders)
        near(
            out,
            lambda f: f(own_ds[0]) @ f(a[0]) + f(own_ds[1]) @ f(a[1]) + f(others) @ f(w_others),
            once=False,
        )
        assert torch.equal(around[:, :4], before[:, :4]) and torch.equal(around[:, -5:], before[:, -5:])

        da = [torch.full_like(own, float("nan")) for own in a]
        of_others = cpp.to_adapter(x, ds, dropout, da, others.to(dtype), orders=orders)
        near(of_others, lambda f: f(others.to(dtype)).T @ f(x))
        for g, own in enumerate(da):
            near(own, lambda f: f(own_ds[g]).T @ f(x))  # noqa: B023 # called at once


@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "heads"), [(4, 1), (4, 2), (9, 1)])  # by set; the last by expert
def test_no_number_of_threads_changes_a_bit(experts: int, heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gates = torch.stack([gates_of(900, experts, 2) for _ in range(heads)], dim=1)
    x, *dys = (torch.randn(900, F).to(dtype) for F in (300, 200, 200))
    R, before, found = 32 * experts, torch.get_num_threads(), []
    a, b = [torch.randn(R, 300) for _ in dys], [torch.randn(200, R) for _ in dys]
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ys, s = cpp.forward(x, [], [], a, b, gates, None, 2.0, 0.0, 0, 2)
            dx, da, db, dgates = cpp.backward(dys, x, [], a, b, gates, s, None, 2.0, 0.0, 0, True, True, True, 2)
            found.append((*ys, s, dx, da, *db, dgates))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, *more in zip(*found, strict=True) for other in more)


def test_gates_may_be_a_view_of_others() -> None:
    torch.manual_seed(0)
    of_many = torch.stack([gates_of(500, 4, 2) for _ in range(3)], dim=1)
    x, a, b = torch.randn(500, 48), torch.randn(32, 48), torch.randn(40, 32)
    for gates in (of_many[:, 1:2], of_many.transpose(0, 1).contiguous().transpose(0, 1)[:, 1:2]):
        found = [cpp.forward(x, [], [], [a], [b], g, None, 2.0, 0.0, 0, 2) for g in (gates, gates.contiguous())]
        assert torch.equal(found[0][0][0], found[1][0][0]) and torch.equal(found[0][1], found[1][1])


def test_what_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = torch.rand(4, 1, 4)
    served = [cpp.serves(torch.zeros(4, 8, dtype=dtype), gates) for dtype in (torch.float16, torch.float64)]
    assert served == [False, False]
    assert not cpp.serves(torch.zeros(4, 8), torch.rand(4, 1, 65))
    assert cpp.serves(torch.zeros(4, 8), gates) and cpp.serves(torch.zeros(4, 8).bfloat16(), gates)
    assert not cpp.serves(torch.zeros(4, 8).bfloat16(), None)  # plain LoRA: as fast without
    monkeypatch.setattr(cpp, "has_amx", lambda: True)
    assert cpp.serves(torch.zeros(4, 8), gates) and not cpp.serves(torch.zeros(4, 8), None)
    with use_backend("torch"):
        assert not cpp.serves(torch.zeros(4, 8), gates)
