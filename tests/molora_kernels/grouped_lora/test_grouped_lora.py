"""Grouped LoRA: its definition differentiates, the torch backend follows it, and it is a good operator of PyTorch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lora_cases import CASES, DTYPES, LoraCase, check, lora_inputs, results
from torch import Tensor

from molora_kernels import grouped_lora, use_backend, use_form
from molora_kernels.backend import Backend, compiler_installed
from molora_kernels.grouped_lora import cost, op, portable, portable_grouped
from molora_kernels.grouped_lora.dispatch import Form

SMALL = LoraCase(T=5, K=6, N=(4, 3), E=2, r=2, H=2, chosen=1, p=0.2, bias=True)
FORMS: tuple[Form, ...] = ("dense", "grouped")
PORTABLE = [
    "torch",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(not compiler_installed(), reason="there is no C++ compiler here")
    ),
]


@pytest.mark.parametrize(
    ("backend", "form"),
    [("reference", "dense"), ("torch", "dense"), ("torch", "grouped"), ("triton", "dense"), ("triton", "grouped")],
)
@pytest.mark.parametrize("case", [SMALL, LoraCase(T=4, K=5, N=(3,), E=1, r=2, H=0)], ids=str)
def test_gradients_in_fp64(case: LoraCase, backend: Any, form: Form, device: torch.device) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    i = lora_inputs(case, device=device).double()
    groups, chosen = len(case.N), None if i.gates is None else i.gates != 0

    def run(x: Tensor, gates: Tensor | None, *adapters: Tensor) -> tuple[Tensor, ...]:
        if gates is not None and chosen is not None:
            gates = gates.where(chosen, 0.0)
        return grouped_lora(
            x, i.weights, adapters[:groups], adapters[groups:], scaling=2.0, gates=gates, top_k=i.top_k,
            biases=i.biases, dropout_p=i.dropout_p, dropout_seed=i.dropout_seed,
        )  # fmt: skip

    leaves = [t if t is None else t.requires_grad_() for t in (i.x, i.gates, *i.lora_a, *i.lora_b)]
    with use_backend(backend), use_form(form):
        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", PORTABLE)
def test_portable_backends_follow_the_reference(
    backend: Backend, form: Form, case: LoraCase, dtype: torch.dtype
) -> None:
    check(lora_inputs(case, dtype), backend, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", PORTABLE)
def test_a_chosen_gate_may_underflow_to_zero(backend: Backend, form: Form) -> None:
    inputs = lora_inputs(CASES[4])
    assert inputs.gates is not None
    inputs.gates[:5] = 0.0
    inputs.gates[5:9, :, :3] = 0.0
    check(inputs, backend, form)


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[6]], ids=str)
def test_grouped_form_repeats_bit_for_bit(case: LoraCase) -> None:
    once, again = (results(lora_inputs(case), "torch", "grouped") for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_default_dtype_changes_nothing(form: Form, default: torch.dtype) -> None:
    inputs = lora_inputs(CASES[2])
    once, before = results(inputs, "torch", form), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        again = results(inputs, "torch", form)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_torch_backend_with_masters_in_the_dtype_of_x(form: Form, dtype: torch.dtype) -> None:
    check(lora_inputs(CASES[2], dtype, masters=dtype), "torch", form)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("narrow", ["the first A", "every A", "gates"])
def test_what_is_narrower_than_x_costs_no_precision(
    narrow: str, form: Form, backend: Any, device: torch.device
) -> None:
    """Not what it is multiplied by, the scale of dropout's survivors or of the experts, nor another's gradient."""
    if backend == "triton":
        pytest.importorskip("triton")
    i = lora_inputs(CASES[2], device=device)
    assert i.gates is not None
    narrowed = {
        "the first A": dict(lora_a=[i.lora_a[0].bfloat16(), *i.lora_a[1:]]),
        "every A": dict(lora_a=[a.bfloat16() for a in i.lora_a]),
        "gates": dict(gates=i.gates.bfloat16()),
    }
    check(replace(i, **narrowed[narrow]), backend, form)


def test_leading_dimensions_are_kept_and_dropout_is_the_seeds() -> None:
    i = lora_inputs(LoraCase(T=12, K=6, N=(4,), E=2, r=2, H=1, p=0.5))
    assert i.gates is not None

    def run(shape: tuple[int, ...], seed: int) -> Tensor:
        (y,) = grouped_lora(
            i.x.view(*shape, 6), i.weights, i.lora_a, i.lora_b, scaling=1.0, gates=i.gates.view(*shape, 1, 2),
            dropout_p=0.5, dropout_seed=torch.tensor(seed),
        )  # fmt: skip
        return y

    assert run((3, 4), 1).shape == (3, 4, 4)
    assert torch.equal(run((3, 4), 1).flatten(0, 1), run((12,), 1))
    assert not torch.equal(run((12,), 1), run((12,), 2))


@pytest.mark.parametrize(
    ("case", "form"), [(SMALL, "dense"), (SMALL, "grouped"), (LoraCase(T=4, K=5, N=(3,), E=1, r=2, H=0), "dense")]
)
def test_operator(case: LoraCase, form: str) -> None:
    i = lora_inputs(case)
    leaves = [t.requires_grad_() for t in (i.x, *i.lora_a, *i.lora_b)]
    gates = None if i.gates is None else i.gates.requires_grad_()
    n = len(case.N)
    arguments = (
        leaves[0],
        i.weights,
        i.biases,
        leaves[1 : 1 + n],
        leaves[1 + n :],
        gates,
        i.dropout_seed,
        2.0,
        case.p,
        0,
        case.chosen,
        form,
    )
    torch.library.opcheck(op.grouped_lora_fwd, arguments)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_graph_break(form: Form) -> None:
    i = lora_inputs(SMALL)
    x = i.x.requires_grad_()

    def run(x: Tensor) -> Tensor:
        outputs = grouped_lora(
            x, i.weights, i.lora_a, i.lora_b, scaling=2.0, gates=i.gates, top_k=i.top_k,
            biases=i.biases, dropout_p=i.dropout_p, dropout_seed=i.dropout_seed,
        )  # fmt: skip
        return sum((y.square().sum() for y in outputs), x.new_zeros(()))

    with use_backend("torch"), use_form(form):
        eager = torch.autograd.grad(run(x), x)[0]
        compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x), x)[0]
    torch.testing.assert_close(compiled, eager)


FLAGS = ("need_dx", "need_dlora", "need_dgates")


@pytest.mark.parametrize("trained", [("x",), ("lora",), ("gates",), ("x", "gates"), ("lora", "gates")], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_trained_is_computed(
    form: Form, trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    i = lora_inputs(SMALL)
    seen: list[tuple[bool, ...]] = []

    def backward(*args: Any) -> Any:
        seen.append(args[11:14])
        return original(*args)

    module = portable if form == "dense" else portable_grouped
    original = module.backward
    monkeypatch.setattr(module, "backward", backward)
    groups = {"x": [i.x], "lora": [*i.lora_a, *i.lora_b], "gates": [i.gates]}
    leaves = [t.requires_grad_() for name in trained for t in groups[name] if t is not None]
    with use_backend("torch"), use_form(form):
        outputs = grouped_lora(
            i.x, i.weights, i.lora_a, i.lora_b, scaling=2.0, gates=i.gates, top_k=i.top_k, biases=i.biases
        )
        grads = torch.autograd.grad(outputs, leaves, i.dys)
    assert seen == [tuple(name in trained for name in ("x", "lora", "gates"))]
    everything = results(lora_inputs(LoraCase(**{**SMALL.__dict__, "p": 0.0})), "torch")
    names = {"x": ["dx"], "lora": ["da0", "da1", "db0", "db1"], "gates": ["dgates"]}
    for name, grad in zip([n for t in trained for n in names[t]], grads, strict=True):
        if name == "dgates" and i.gates is not None:
            grad = grad.where(i.gates != 0, 0.0)  # as results() has them
        torch.testing.assert_close(grad, everything[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_a": []}, "as many of each"),
        ({"biases": [torch.zeros(4)]}, "as many of each"),
        ({"lora_a": [torch.zeros(4, 7)] * 2}, "projection 0 has weight"),
        ({"lora_b": [torch.zeros(4, 3)] * 2}, "projection 0 has weight"),
        ({"weights": [torch.zeros(4, 6).half(), torch.zeros(3, 6)]}, "weight 0 is torch.float16"),
        ({"weights": [torch.zeros(4, 6, requires_grad=True), torch.zeros(3, 6)]}, "requires grad"),
        ({"biases": [torch.zeros(1), torch.zeros(3)]}, r"bias 0 is \(1,\)"),
        ({"biases": [torch.zeros(4), torch.zeros(3).half()]}, "bias 1 is .* torch.float16"),
        ({"gates": torch.zeros(5, 3, 2)}, "gates are"),
        ({"gates": torch.zeros(5, 1, 3)}, "gates are"),
        ({"top_k": 3}, "top_k=3"),
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
        ({"dropout_p": 0.1}, "needs dropout_seed"),
        ({"dropout_p": 0.1, "dropout_seed": 7}, "needs dropout_seed"),
        ({"dropout_p": 0.1, "dropout_seed": torch.tensor(7, device="meta")}, "on meta; expected one device"),
    ],
    ids=str,
)
def test_bad_input_teaches(change: dict[str, Any], message: str) -> None:
    i = lora_inputs(SMALL)
    good = dict(weights=i.weights, lora_a=i.lora_a, lora_b=i.lora_b, gates=i.gates, scaling=1.0)
    with pytest.raises(ValueError, match=message):
        grouped_lora(i.x, **{**good, **change})


def test_cost_counts_every_product() -> None:
    T, K, N, P = 8192, 3072, (8192, 8192), 256
    forward = cost.forward(T, K, N, P, heads=2, experts=4)
    assert forward.base_flops == 2 * T * K * sum(N)
    assert forward.adapter_flops == 2 * T * P * K + 2 * T * (P // 2) * sum(N)
    backward = cost.backward(T, K, N, P, heads=2, experts=4)
    assert backward.base_flops == forward.base_flops
    assert backward.adapter_flops == 2 * forward.adapter_flops
    assert cost.backward(T, K, N, P, heads=2, experts=4, need_dlora=False).adapter_flops == forward.adapter_flops
    gated, plain = (cost.backward(T, K, N, P, heads=heads).adapter_bytes for heads in (2, 0))
    assert gated - plain == 2 * 4 * T * P + 8 * T * 2  # a plain LoRA makes no pass over the shrink
