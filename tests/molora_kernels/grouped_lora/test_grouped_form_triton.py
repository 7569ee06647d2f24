"""The grouped form's kernels: sets against Python, results against the reference in fp64, on awkward choices."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lora_cases import LoraCase, check, lora_inputs, results
from torch import Tensor

from molora_kernels.grouped_lora import cost

pytest.importorskip("triton")
sets = importlib.import_module("molora_kernels.grouped_lora.sets")
grouped = importlib.import_module("molora_kernels.grouped_lora.grouped")


def gates_of(tokens: int, experts: int, top_k: int, device: torch.device, seed: int = 0) -> Tensor:
    values = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    rank = values.argsort(-1, descending=True).argsort(-1)
    return values.where(rank < top_k, 0.0).to(device)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(0, 4, 2), (1, 2, 1), (40, 3, 3), (100, 8, 2), (70, 64, 8), (40, 17, 1)]
)
@pytest.mark.usefixtures("poisoned")
def test_sets_and_orders(tokens: int, experts: int, top_k: int, device: torch.device) -> None:
    gates = gates_of(tokens, experts, top_k, device).abs()
    made = sets.sets_of(gates, top_k, 32)
    expected = [sorted(row.topk(top_k).indices.tolist()) for row in gates.cpu()]
    assert made.chosen.tolist() == expected
    for row, slots in zip(expected, made.slots.tolist(), strict=True):
        assert slots == [row.index(e) if e in row else -1 for e in range(experts)]
    order = made.order.tolist()
    assert sorted(order) == list(range(tokens))
    in_order = [tuple(expected[t]) for t in order]
    assert len(set(in_order)) == sum(a != b for a, b in zip(in_order, [None, *in_order], strict=False))
    for i, (count, of_tile) in enumerate(zip(made.counts.tolist(), made.experts.tolist(), strict=True)):
        assert of_tile[:count] == sorted({e for row in in_order[32 * i : 32 * (i + 1)] for e in row})

    pairs, starts = made.by_expert
    for e in range(experts):
        of_expert = [divmod(pair, top_k) for pair in pairs[starts[e] : starts[e + 1]].tolist()]
        assert of_expert == [(t, row.index(e)) for t, row in enumerate(expected) if e in row]


def test_pairs_are_sorted_once_for_each_gate_set(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    inputs = lora_inputs(LoraCase(T=40, K=24, N=(16, 32), E=4, r=4, H=1), torch.float16, device)
    sorts = []
    sort = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda t, **options: (sorts.append(len(t)), sort(t, **options))[1])
    results(inputs, "triton", "grouped")
    assert sorts == [40, 40, 80]  # sets in forward and again in backward; pairs for four weight gradients


def test_every_token_has_its_experts_whatever_its_gates_are(device: torch.device) -> None:
    """Ties and underflow to the lower index, signs by magnitude, and NaN (a padding token's) never out of bounds."""
    gates = torch.tensor([[0.0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, -2, 0, 1, 0], [torch.nan] * 5], device=device)
    assert sets.sets_of(gates, 2, 32).chosen.tolist() == [[0, 1], [0, 4], [1, 3], [0, 1]]


CHOICES = {
    "all on one": lambda T, E: torch.full((T, 1), E - 1),
    "none on the first": lambda T, E: 1 + torch.arange(T)[:, None] % (E - 1),
    "two lots": lambda T, E: torch.where(torch.arange(T)[:, None] < 3, 0, 1),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.usefixtures("poisoned")
def test_uneven_choices(choice: str, device: torch.device) -> None:
    case = LoraCase(T=75, K=40, N=(24, 70), E=5, r=4, H=2, chosen=1, p=0.2)
    gates = torch.zeros(75, 2, 5).scatter_(2, CHOICES[choice](75, 5)[:, None].expand(75, 2, 1), 0.7).to(device)
    check(replace(lora_inputs(case, torch.float16, device), gates=gates), "triton", "grouped")


@settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    E = data.draw(st.integers(2, 9), label="E")
    N = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=2), label="N")
    case = LoraCase(
        T=data.draw(st.integers(0, 70), label="T"),
        K=data.draw(st.integers(1, 70), label="K"),
        N=tuple(N),
        E=E,
        r=data.draw(st.integers(1, 20), label="r"),
        H=data.draw(st.sampled_from([1, len(N)]), label="H"),
        chosen=data.draw(st.integers(1, min(E, 8)), label="k"),
        bias=data.draw(st.booleans(), label="bias"),
        p=data.draw(st.sampled_from([0.0, 0.4]), label="p"),
        strided=data.draw(st.booleans(), label="strided"),
        idle=True,
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]), label="dtype")
    check(lora_inputs(case, dtype, "cuda" if torch.cuda.is_available() else "cpu"), "triton", "grouped")


@pytest.mark.parametrize(("E", "r", "chosen"), [(3, 150, 2), (64, 1, 8)])
def test_an_expert_wider_than_a_block_and_the_most_experts(E: int, r: int, chosen: int, device: torch.device) -> None:
    case = LoraCase(T=9, K=24, N=(20,), E=E, r=r, H=1, chosen=chosen)
    check(lora_inputs(case, torch.float16, device), "triton", "grouped")


def test_padding_may_hold_anything(device: torch.device) -> None:
    """Tokens whose rows and gates are NaN spoil nothing of the others'. (The order of their sums may change: a tile's
    list of experts is another.)"""
    inputs = lora_inputs(LoraCase(T=40, K=16, N=(24,), E=4, r=4, H=1), device=device)
    assert inputs.gates is not None
    x, gates = inputs.x.clone(), inputs.gates.clone()
    x[25:], gates[25:] = torch.nan, torch.nan
    spoilt, whole = (results(i, "triton", "grouped") for i in (replace(inputs, x=x, gates=gates), inputs))
    for name in ("y0", "dx", "dgates"):
        torch.testing.assert_close(spoilt[name][:25], whole[name][:25])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_repeats_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    inputs = lora_inputs(LoraCase(T=200, K=40, N=(40,), E=8, r=8, H=1, p=0.1), dtype, device)
    first, again = (results(inputs, "triton", "grouped") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_only_what_is_needed_is_computed(need: tuple[bool, bool, bool], device: torch.device) -> None:
    i = lora_inputs(LoraCase(T=9, K=12, N=(5, 6), E=3, r=3, H=2), device=device)
    s = torch.randn(9, 12, device=device)
    arguments = (i.dys, i.x, i.weights, i.lora_a, i.lora_b, i.gates, s, None, 2.0, 0.0, 0)
    everything, some = grouped.backward(*arguments, True, True, True, 2), grouped.backward(*arguments, *need, 2)
    for place, needed in zip((0, 1, 3), need, strict=True):
        assert torch.equal(some[place], everything[place]) if needed else some[place].numel() == 0
    assert len(some[2]) == (2 if need[1] else 0)


def test_cost_counts_every_launch(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    T, K, N, E, k, r = 40, 24, (16, 32), 4, 2, 4
    found = {"flops": 0, "elements": 0}

    def counted(module: object, name: str, count: Callable[..., tuple[int, int]]) -> None:
        original = getattr(module, name)

        def counting(*args: Any, **options: Any) -> Any:
            flops, elements = count(*args, **options)
            found["flops"] += flops
            found["elements"] += elements
            return original(*args, **options)

        monkeypatch.setattr(module, name, counting)

    def shrink(x: Tensor, a: Tensor, _: Any, s: Tensor, *rest: Any) -> tuple[int, int]:
        return 2 * s.numel() * x.shape[1], x.numel() + a.numel() + s.numel()

    def expand(s: Tensor, b: Tensor, _: Any, y: Tensor, *, add: bool = False, **rest: Any) -> tuple[int, int]:
        return 2 * s.numel() * y.shape[1], s.numel() + b.numel() + (1 + add) * y.numel()

    def weights(x: Tensor, left: Tensor, *rest: Any, **more: Any) -> tuple[int, int]:
        in_fp32 = 2 * E * r * x.shape[1]  # as elements of 16 bits
        return 2 * left.numel() * x.shape[1], k * x.numel() + left.numel() + in_fp32

    counted(grouped, "_shrink", shrink)
    counted(grouped, "_expand", expand)
    counted(grouped, "_weight_terms", weights)
    counted(grouped.gating, "gate", lambda s, *_: (0, 2 * s.numel()))
    counted(grouped.gating, "gate_backward", lambda _, s, *__, **___: (0, 4 * s.numel()))
    inputs = lora_inputs(LoraCase(T=T, K=K, N=N, E=E, r=r, H=2, chosen=k), torch.float16, device)
    results(inputs, "triton", "grouped")

    sizes = dict(heads=2, experts=E, top_k=k)
    forward, backward = (of(T, K, N, E * r * len(N), **sizes) for of in (cost.forward, cost.backward))
    assert found["flops"] == forward.adapter_flops + backward.adapter_flops
    narrow = 12 * T * 2 * k  # gates, and their gradients
    narrow += cost._sorting(T, 2, **sizes) + cost._sorting(T, 2, **sizes, sums=2)
    again = T * sum(N) + T * K  # y and dx, which the frozen projections add to
    assert 2 * (found["elements"] + again) + narrow == forward.adapter_bytes + backward.adapter_bytes


def test_cost_is_that_of_the_chosen_experts_and_of_the_rows_that_they_move() -> None:
    dense, by_set = (cost.forward(8192, 3072, (8192,), 32 * 32, heads=1, experts=32, top_k=k) for k in (None, 2))
    assert dense.adapter_flops == 16 * by_set.adapter_flops
    assert by_set.base_flops == dense.base_flops and by_set.base_bytes == dense.base_bytes
    # Rows by set move once, as dense ones do; those of the weight gradients once for each expert of their token.
    one, two = (cost.backward(8192, 3072, (8192,), 1024, heads=1, experts=32, top_k=k).adapter_bytes for k in (1, 2))
    assert two - one > 2 * 8192 * (3072 + 8192)


def test_more_experts_than_a_set_has_bits_is_explained(device: torch.device) -> None:
    with pytest.raises(ValueError, match="up to 64 experts"):
        sets.sets_of(torch.zeros(3, 65, device=device), 2, 32)


REAL = LoraCase(T=8192, K=3072, N=(8192, 8192), E=32, r=32, H=2, p=0.08)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_shapes_on_the_gpu(dtype: torch.dtype) -> None:
    check(lora_inputs(replace(REAL, T=2048), dtype, "cuda"), "triton", "grouped")


@pytest.mark.gpu
def test_a_hundred_runs_are_one_on_the_gpu() -> None:
    inputs = lora_inputs(REAL, torch.bfloat16, "cuda")
    first = results(inputs, "triton", "grouped")
    for _ in range(99):
        again = results(inputs, "triton", "grouped")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    """A replay sorts by the gates that it finds: nothing of the choice is fixed at capture."""
    inputs = lora_inputs(replace(REAL, T=1024), torch.bfloat16, "cuda")
    assert inputs.gates is not None
    other = replace(inputs, gates=inputs.gates.roll(3, -1).contiguous())
    expected = results(other, "triton", "grouped")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # allocations and compilation happen before the capture
        results(inputs, "triton", "grouped")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    assert other.gates is not None
    with torch.cuda.graph(graph):
        captured = results(inputs, "triton", "grouped")
    inputs.gates.copy_(other.gates)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(expected[name], captured[name]) for name in expected)


def test_gradients_of_gates_lie_in_memory_as_the_operator_says(device: torch.device) -> None:
    """Contiguous, however the gates lie: ``torch.compile`` goes by it."""
    gates = lora_inputs(LoraCase(T=20, K=16, N=(9, 12), E=4, r=4, H=2), torch.float16, device).gates
    assert gates is not None
    gates = gates.transpose(0, 1).contiguous().transpose(0, 1)
    sets = grouped.sets_of_all(gates, 2, torch.float16)
    columns = torch.randn(20, 2 * 2 * 4, device=device).half()  # of two projections, two experts each
    *_, dgates = grouped.gate_backward(
        columns, columns, gates, sets, 2, 1.0, need_ds=False, need_gated=False, need_dgates=True
    )
    assert dgates.is_contiguous() and not gates.is_contiguous()
