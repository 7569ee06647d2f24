"""The grouped form's C++ kernels: each product against its definition, over tiles' edges, and what they must not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from molora_kernels import backend, use_backend, workspace
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
    gates = gates_of(tokens, experts, top_k, idle)
    gates[tokens // 2 :, : experts // 2] = 0.0  # as chosen gates do that underflow
    (found,), expected = cpp.orders_of(gates[:, None], 1, top_k), order.order_of(gates, top_k)
    assert found.once == expected.by_set and found.groups == len(expected.groups)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.starts[: found.groups + 1].diff().tolist() == expected.sizes
    assert found.experts[: found.groups].tolist() == expected.groups


@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "features", "experts", "top_k", "rank"), SIZES)
def test_each_product_is_its_definition_and_nothing_else_is_written(
    tokens: int, features: int, experts: int, top_k: int, rank: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    R, Q = experts * rank, 6
    (x, _), (y, around_y) = (rows_apart(tokens, features, dtype) for _ in "xy")
    gates = gates_of(tokens, experts, top_k)
    a, b, others, w_others = (torch.randn(size) for size in ((R, features), (features, R), (tokens, Q), (Q, features)))
    (groups,) = cpp.orders_of(gates[:, None], 1, top_k)
    # Everything in fp64, in a matrix of all experts' columns, of which a visit has its own.
    ordered = order.order_of(gates, top_k)
    columns_of = (ordered.experts[:, :, None] * rank + torch.arange(rank)).flatten(1)
    at = ordered.tokens[:, None], columns_of

    def spread(visits_VC: Tensor) -> Tensor:
        return torch.zeros(tokens, R, dtype=torch.float64).index_put_(at, visits_VC.double())

    def near(actual: Tensor, product: Callable[[Callable[[Tensor], Tensor]], Tensor], once: bool = True) -> None:
        """Each sum errs by a few roundings of the sum of its terms' magnitudes, and is rounded to its dtype: once, or
        on the way too."""
        exact, magnitude = product(Tensor.double), product(lambda t: t.double().abs())
        error, rounded = (actual.double() - exact).abs(), exact.abs() if once else magnitude
        assert (error <= 4 * FP32 * magnitude + torch.finfo(actual.dtype).eps * rounded).all(), error.max()

    c = gates.repeat_interleave(rank, 1) * 2.0
    s, whole_s = rows_apart(len(ordered.tokens), top_k * rank if groups.once else rank, dtype)
    before = whole_s.clone()
    with workspace.scope():
        gated = cpp.shrink(x, a, groups, gates, 2.0, s)
        near(s, lambda f: (f(x) @ f(a).T)[at])
        near(gated, lambda f: (f(x) @ f(a).T * f(c))[at])
        assert torch.equal(whole_s[:, :4], before[:, :4]) and torch.equal(whole_s[:, -5:], before[:, -5:])

        ds, dgates = torch.empty_strided(s.shape, s.stride()), torch.zeros_like(gates)
        again, saved = cpp.unexpand(x, b, groups, gates, 2.0, s, ds, dgates), spread(s)
        near(ds, lambda f: (f(x) @ f(b) * f(c))[at])
        near(again, lambda f: (f(saved) * f(c))[at])
        near(dgates, lambda f: 2.0 * (f(x) @ f(b) * f(saved)).view(tokens, experts, rank).sum(-1))

        columns = spread(gated)
        for w, across in ((a, True), (b, False)):
            y0, around, w_RF = y.clone(), around_y.clone(), w if across else w.T
            cpp.expand_(y, gated, w, groups, *((others, w_others) if groups.once else ()), across=across)
            with_others = [y0, columns, w_RF, others * groups.once, w_others]
            near(y, lambda f: _expanded(*map(f, with_others)), groups.once)  # noqa: B023 # called at once
            assert torch.equal(around_y[:, :4], around[:, :4]) and torch.equal(around_y[:, -5:], around[:, -5:])
            y.copy_(y0)

            d, d_others = torch.full_like(w, float("nan")), torch.full_like(w_others, float("nan"))
            cpp.grad(x, gated, d, groups, *((others, d_others) if groups.once else ()), factor=0.5, across=not across)
            near(d if across else d.T, lambda f: 0.5 * f(columns).T @ f(x))
            if groups.once:
                near(d_others, lambda f: f(others).T @ f(x))


def _expanded(y: Tensor, columns: Tensor, w_RF: Tensor, others: Tensor, w_others: Tensor) -> Tensor:
    return y + columns @ w_RF + others @ w_others


def test_no_number_of_threads_changes_a_bit() -> None:
    torch.manual_seed(0)
    gates, x, a, y = gates_of(900, 4, 2), torch.randn(900, 300), torch.randn(128, 300), torch.randn(900, 300)
    (groups,), found, before = cpp.orders_of(gates[:, None], 1, 2), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            s, own_y, d = torch.empty(900, 64), y.clone(), torch.empty_like(a)
            with workspace.scope():
                gated = cpp.shrink(x, a, groups, gates, 2.0, s)
                cpp.expand_(own_y, gated, a, groups)
                found.append((s, own_y, cpp.grad(x, gated, d, groups)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, *more in zip(*found, strict=True) for other in more)


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
