"""The rule that chooses a form, how it is overruled, and the groups that tokens are sorted into."""

from __future__ import annotations

import pytest
import torch

from molora_kernels import backend, grouped_lora, use_backend, use_form
from molora_kernels.cpu import has_amx
from molora_kernels.grouped_lora import dispatch, order
from molora_kernels.grouped_lora.dispatch import Resolved, choose_form, form_for


@pytest.mark.parametrize(
    ("experts", "capability", "form"),
    [
        (4, (8, 0), "dense"),
        (4, (8, 6), "dense"),
        (8, (8, 6), "grouped"),
        (12, (8, 9), "dense"),
        (16, (8, 9), "grouped"),
        (16, (9, 0), "dense"),
        (32, (9, 0), "grouped"),
        (16, (13, 7), "dense"),  # unknown
    ],
)
def test_on_a_gpu_many_experts_are_grouped(experts: int, capability: tuple[int, int], form: Resolved) -> None:
    assert choose_form(8192, 3072, experts, 2, 32, torch.bfloat16, "cuda", capability) == form


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rank", "fp32", "bf16"),
    [  # measured: the time of grouped over that of dense in fp32 and in bf16
        (2048, 4, 2, 32, "grouped", "dense"),  # 0.98, 1.01
        (2048, 4, 2, 16, "dense", "dense"),  # 1.02, 1.05
        (2048, 4, 2, 64, "grouped", "grouped"),  # 0.96, 0.93
        (2048, 8, 2, 16, "dense", "dense"),  # 1.01, 1.04
        (2048, 8, 2, 32, "grouped", "dense"),  # 0.90, 1.02
        (2048, 16, 2, 16, "grouped", "grouped"),  # 0.84, 0.93
        (2048, 32, 2, 32, "grouped", "grouped"),  # 0.50
        (1024, 4, 2, 32, "dense", "dense"),  # 1.02
        (512, 4, 2, 32, "dense", "dense"),  # 1.09, 1.16
        (256, 4, 2, 32, "dense", "dense"),  # 1.09, 1.38
        (512, 16, 2, 32, "dense", "dense"),
        (0, 16, 2, 32, "dense", "dense"),
    ],
)
def test_on_a_cpu_the_form_is_the_one_measured_faster(
    tokens: int, experts: int, top_k: int, rank: int, fp32: Resolved, bf16: Resolved
) -> None:
    assert choose_form(tokens, 1024, experts, top_k, rank, torch.float32, "cpu") == fp32
    assert choose_form(tokens, 1024, experts, top_k, rank, torch.bfloat16, "cpu") == bf16


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rank", "fp32", "bf16"),
    [  # measured with its kernels compiled
        (2048, 4, 2, 32, "grouped", "grouped"),  # 0.90, 0.91
        (2048, 4, 2, 8, "grouped", "grouped"),  # 0.97, 0.99
        (2048, 4, 3, 32, "grouped", "grouped"),  # 0.87, 0.99
        (2048, 8, 2, 32, "grouped", "grouped"),  # 0.79, 0.82
        (2048, 16, 2, 32, "grouped", "grouped"),  # 0.60, 0.64
        (256, 8, 2, 32, "grouped", "grouped"),  # 0.90, 0.93
        (64, 16, 2, 32, "grouped", "dense"),  # 0.83, 1.21
        (16, 16, 2, 32, "grouped", "dense"),  # 0.92, 1.55
        (0, 16, 2, 32, "dense", "dense"),
    ],
)
def test_compiled_to_cpp_few_experts_are_the_cheaper(
    tokens: int, experts: int, top_k: int, rank: int, fp32: Resolved, bf16: Resolved
) -> None:
    for dtype, form in ((torch.float32, fp32), (torch.bfloat16, bf16)):
        assert choose_form(tokens, 1024, experts, top_k, rank, dtype, "cpu", compiled=True) == form


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rank", "fp32", "bf16"),
    [  # likewise on one with AMX
        (2048, 4, 2, 32, "dense", "dense"),  # 1.03, 2.77
        (2048, 4, 2, 64, "grouped", "dense"),  # fp32: 0.95
        (2048, 8, 2, 16, "dense", "dense"),  # fp32: 1.21
        (2048, 8, 2, 32, "dense", "dense"),  # 1.05, 3.07
        (2048, 16, 2, 32, "grouped", "dense"),  # 0.83, 2.07
        (2048, 32, 2, 32, "grouped", "dense"),  # 0.64, 1.57
        (2048, 32, 2, 64, "grouped", "dense"),  # bf16: 1.17
        (8192, 16, 1, 32, "grouped", "dense"),  # bf16: 1.61
        (8192, 32, 2, 32, "grouped", "dense"),  # bf16: 1.29
        (8192, 64, 1, 32, "grouped", "grouped"),  # bf16: 0.60
        (8192, 64, 2, 32, "grouped", "grouped"),  # bf16: 0.72
        (16384, 64, 2, 32, "grouped", "grouped"),  # bf16: 0.73
        (512, 8, 2, 32, "dense", "dense"),  # fp32: 1.11
    ],
)
def test_the_faster_a_cpu_multiplies_the_more_must_be_spared(
    tokens: int, experts: int, top_k: int, rank: int, fp32: Resolved, bf16: Resolved
) -> None:
    assert choose_form(tokens, 1024, experts, top_k, rank, torch.float32, "cpu", amx=True) == fp32
    assert choose_form(tokens, 1024, experts, top_k, rank, torch.bfloat16, "cpu", amx=True) == bf16


@pytest.mark.parametrize(
    ("features", "experts", "rank", "dtype", "form"),
    [  # measured at 2,048 tokens, top-2 and 2.75 times as many intermediate features
        (128, 4, 32, torch.float32, "dense"),  # 1.17
        (256, 4, 32, torch.float32, "dense"),  # 0.89 and 0.93 alone, 0.98 and 1.04 in a training step
        (256, 4, 64, torch.float32, "grouped"),  # 0.95
        (256, 4, 128, torch.float32, "grouped"),  # 0.75
        (256, 8, 32, torch.float32, "grouped"),  # 0.91
        (256, 4, 64, torch.bfloat16, "dense"),  # 1.45
        (256, 8, 32, torch.bfloat16, "dense"),  # 1.56
        (384, 8, 32, torch.bfloat16, "dense"),  # 1.16
        (512, 8, 32, torch.bfloat16, "dense"),  # 1.06
        (1024, 4, 64, torch.bfloat16, "grouped"),  # 1.00
    ],
)
def test_what_a_group_costs_besides_shows_where_rows_are_narrow(
    features: int, experts: int, rank: int, dtype: torch.dtype, form: Resolved
) -> None:
    assert choose_form(2048, features, experts, 2, rank, dtype, "cpu") == form


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_with_all_experts_chosen_there_is_nothing_to_group(device: str) -> None:
    assert choose_form(8192, 1024, 64, 64, 64, torch.float32, device, (8, 0)) == "dense"


def test_the_rule_can_be_overruled_and_this_undone() -> None:
    x = torch.zeros(8, 4)
    for form in ("dense", "grouped"):
        with use_form(form):
            assert dispatch.form_for(x, 4, 2, 8) == form
            assert dispatch.form_for(x, 4, None, 8) == dispatch.form_for(x, 4, 4, 8) == "dense"
    for name in ("torch", "inductor") if backend.compiler_installed() else ("torch",):
        with use_backend(name):
            chosen = choose_form(8, 4, 4, 2, 8, x.dtype, "cpu", amx=has_amx(), compiled=name == "inductor")
            assert dispatch.form_for(x, 4, 2, 8) == chosen
    with pytest.raises(ValueError, match="choose one of"):
        use_form("sparse")  # type: ignore[arg-type]


def test_backward_runs_the_form_of_its_forward() -> None:
    gates = torch.tensor([[[0.4, 0.6, 0.0]], [[0.0, 0.7, 0.3]]])
    x, a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 8), torch.randn(5, 6)
    with use_form("grouped"):
        (y,) = grouped_lora(x, [torch.randn(5, 8)], [a], [b], scaling=1.0, gates=gates, top_k=2)
        (inside,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    with use_form("dense"):
        (outside,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(inside, outside)


@pytest.mark.parametrize(("experts", "top_k", "visits"), [(4, 2, 1), (5, 3, 1), (8, 2, 2), (3, 1, 1), (64, 1, 1)])
def test_groups_hold_each_token_with_the_experts_it_chose(experts: int, top_k: int, visits: int) -> None:
    gates = torch.randn(50, experts, generator=torch.Generator().manual_seed(0))  # of either sign
    dropped = gates.abs().argsort(1)[:, : experts - top_k]
    gates.scatter_(1, dropped, 0.0)
    chosen = torch.zeros_like(gates, dtype=torch.bool)
    seen = torch.zeros(50, dtype=torch.int64)
    ordered = order.order_of(gates, top_k)
    parts = zip(ordered.groups, ordered.tokens.split(ordered.sizes), ordered.experts.split(ordered.sizes), strict=True)
    for group, tokens, chosen_by_each in parts:
        seen[tokens] += 1
        assert torch.equal(tokens, tokens.sort().values)
        assert (chosen_by_each == torch.tensor(group)).all() and group == sorted(group)
        for e in group:
            chosen[tokens, e] = True
    assert torch.equal(chosen, gates != 0) and (seen == visits).all()
    assert torch.equal(ordered.gates, gates[ordered.tokens[:, None], ordered.experts])
    if ordered.by_set:
        assert torch.equal(ordered.tokens[ordered.positions()], torch.arange(50))


def test_zeros_are_chosen_by_index_where_too_few_gates_are_not_zero() -> None:
    ordered = order.order_of(torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 3), 2)
    assert ordered.groups == [[0, 2]] and ordered.tokens.tolist() == [0, 1, 2]
    nothing = order.order_of(torch.zeros(0, 4), 2)
    assert nothing.sizes == [] and nothing.groups == [] and nothing.experts.shape == (0, 2)


def test_without_tokens_there_is_nothing_to_sort() -> None:
    with use_form("grouped"):
        assert form_for(torch.zeros(0, 64), experts=4, top_k=2, rank=8) == "dense"
