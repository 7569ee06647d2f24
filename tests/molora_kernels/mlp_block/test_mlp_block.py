"""The SwiGLU block: its definition differentiates, the torch backend follows it, and it is a good operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mlp_cases import CASES, DTYPES, MlpCase, MlpInputs, check, mlp_inputs, results
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from molora_kernels import Projection, Router, mlp_block, use_backend, use_form
from molora_kernels.backend import Backend
from molora_kernels.grouped_lora import portable as grouped_lora_portable
from molora_kernels.grouped_lora.dispatch import Form
from molora_kernels.mlp_block import cost, op, portable

FORMS: tuple[Form, ...] = ("dense", "grouped")
SMALL = MlpCase(T=5, K=4, inner=6, E=2, r=2, H=3, top_k=1, p=0.2, bias=True)


def block_of(i: MlpInputs, case: MlpCase, x: Tensor) -> tuple[Tensor, Tensor]:
    projections = [Projection(*args) for args in zip(i.weights, i.lora_a, i.lora_b, strict=True)]
    routers = [
        Router(weight, None, selection) for weight, selection in zip(i.router_weights, i.selection_biases, strict=True)
    ]
    out = mlp_block(
        x, *projections, routers, top_k=case.top_k, scaling=2.0, mask=i.mask, dropout_p=case.p,
        dropout_seed=i.dropout_seed,
    )  # fmt: skip
    return out.y, out.sums


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("H", [0, 1, 3])
def test_gradients_in_fp64(H: int, backend: Any, device: torch.device) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    case = MlpCase(**{**SMALL.__dict__, "H": H, "bias": False, "p": 0.2 if H == 3 else 0.0})
    i = mlp_inputs(case, device=device).double()
    leaves = [t.requires_grad_() for t in (i.x, *i.lora_a, *i.lora_b, *i.router_weights)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *_: block_of(i, case, i.x)[: 2 if H else 1], leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_torch_backend_follows_the_reference(form: Form, case: MlpCase, dtype: torch.dtype) -> None:
    check(mlp_inputs(case, dtype), case, "torch", form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[2:7], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_compiled_passes_follow_the_reference(
    form: Form, case: MlpCase, dtype: torch.dtype, every_pass_compiled: None
) -> None:
    i = mlp_inputs(case, dtype)
    check(i, case, "inductor", form)
    once, again = (results(i, case, "inductor", form) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[2:7], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_laid_out_for_either_kind_of_cpu(
    form: Form, case: MlpCase, dtype: torch.dtype, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_lora_portable, "has_amx", lambda: amx)
    check(mlp_inputs(case, dtype), case, "torch", form)


@pytest.mark.parametrize("form", FORMS)
def test_routers_keep_their_precision_beside_adapters_of_16_bits(form: Form) -> None:
    i = mlp_inputs(CASES[6])
    narrow = {name: [t.bfloat16() for t in getattr(i, name)] for name in ("lora_a", "lora_b")}
    check(replace(i, **narrow), CASES[6], "torch", form)


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[5]], ids=str)
def test_grouped_form_repeats_bit_for_bit(case: MlpCase) -> None:
    once, again = (results(mlp_inputs(case), case, "torch", "grouped") for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("H", [1, 3])
@pytest.mark.parametrize(("form", "E"), [("dense", 4), ("grouped", 4), ("grouped", 8)])  # by set, and by expert
def test_everything_is_made_on_the_device_of_the_input(form: str, E: int, H: int, backend: Backend) -> None:
    i = mlp_inputs(MlpCase(T=33, K=24, inner=40, E=E, r=2, H=H, top_k=2, bias=True))
    adapters = (i.lora_a, i.lora_b, i.router_weights)
    settings = (i.mask, torch.tensor(3), 2, 2.0, 0.1)
    with use_backend(backend), torch.device("meta"):  # what names no device is made there, and cannot be computed with
        y, *_, saved = portable.forward(
            i.x, i.weights, i.biases, *adapters, i.router_biases, i.selection_biases, *settings, form
        )
        if form == "dense":
            y = portable.down(y, *op.of_down(saved), i.weights[2], i.biases[2], i.lora_b[2], 2.0)
        dx, *_ = portable.backward(i.dy, i.dsums, i.x, i.weights, *adapters, saved, *settings, True, True, True, form)
    assert y.isfinite().all() and dx.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_grouped_form_under_activation_checkpointing(use_reentrant: bool) -> None:
    case = MlpCase(T=33, K=24, inner=40, E=4, r=4, H=3, p=0.1)
    i = mlp_inputs(case)
    leaves = [t.requires_grad_() for t in (i.x, *i.lora_a, *i.lora_b, *i.router_weights)]

    def block(x: Tensor) -> Tensor:
        return block_of(i, case, x)[0]

    with use_backend("torch"), use_form("grouped"):
        plain = torch.autograd.grad(block(i.x), leaves, i.dy)
        checkpoint(block, i.x, use_reentrant=use_reentrant).backward(i.dy)
    assert all(torch.equal(t.grad, grad) for t, grad in zip(leaves, plain, strict=True) if t.grad is not None)
    assert all(t.grad is not None for t in leaves)


@pytest.mark.parametrize(("H", "form"), [(0, "dense"), (1, "dense"), (3, "dense"), (1, "grouped"), (3, "grouped")])
def test_operator(H: int, form: str) -> None:
    case = MlpCase(**{**SMALL.__dict__, "H": H})
    i = mlp_inputs(case)
    for t in (i.x, *i.lora_a, *i.lora_b, *i.router_weights, *i.router_biases):
        t.requires_grad_()
    arguments = (
        i.x, i.weights, i.biases, i.lora_a, i.lora_b, i.router_weights, i.router_biases, i.selection_biases, i.mask,
        i.dropout_seed, 1, 2.0, case.p, form,
    )  # fmt: skip
    torch.library.opcheck(op.mlp_block_fwd, arguments)
    if form == "dense":
        with torch.no_grad():  # only the stand-in has a gradient here, all else has it from the first operator
            y, *_, saved, h = op.mlp_block_fwd(*arguments)
            rest = (i.weights[2], i.biases[2] if i.biases else None, i.lora_b[2].detach(), 2.0)
        torch.library.opcheck(op.mlp_block_down, (y.requires_grad_(), h, *op.of_down(saved), *rest))


@pytest.mark.parametrize(("use_reentrant", "again"), [(False, 0), (True, 1)])
def test_what_is_recomputed_stops_before_down(use_reentrant: bool, again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a frozen block, whose last product saves nothing either."""
    i = mlp_inputs(SMALL)
    leaves = [t.requires_grad_() for t in (i.x, *i.lora_a, *i.lora_b, *i.router_weights)]
    calls: list[int] = []
    down = portable.down
    monkeypatch.setattr(portable, "down", lambda *args: (calls.append(1), down(*args))[1])
    with use_backend("torch"), use_form("dense"):
        plain = torch.autograd.grad(block_of(i, SMALL, i.x)[0], leaves, i.dy)
        calls.clear()
        y = checkpoint(lambda x: block_of(i, SMALL, x)[0], i.x, use_reentrant=use_reentrant)
        y.backward(i.dy)
    assert len(calls) == 1 + again
    assert all(torch.equal(t.grad, grad) for t, grad in zip(leaves, plain, strict=True) if t.grad is not None)
    assert all(t.grad is not None for t in leaves)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_graph_break(form: Form) -> None:
    i = mlp_inputs(SMALL)
    x = i.x.requires_grad_()

    def run(x: Tensor) -> Tensor:
        y, sums = block_of(i, SMALL, x)
        return y.square().sum() + sums.square().sum()

    with use_backend("torch"), use_form(form):
        eager = torch.autograd.grad(run(x), x)[0]
        compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x), x)[0]
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("trained", [("x",), ("lora",), ("routers",), ("x", "routers"), ("lora", "routers")], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_trained_is_computed(
    form: Form, trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    i, everything = mlp_inputs(SMALL), mlp_inputs(SMALL)
    seen: list[tuple[bool, ...]] = []

    def backward(*args: Any) -> Any:
        seen.append(args[-4:-1])
        return original(*args)

    original = portable.backward
    monkeypatch.setattr(portable, "backward", backward)

    def grads_of(i: MlpInputs, names: tuple[str, ...]) -> dict[str, tuple[Tensor, ...]]:
        groups = {"x": [i.x], "lora": [*i.lora_a, *i.lora_b], "routers": i.router_weights}
        leaves = [[t.requires_grad_() for t in groups[name]] for name in names]
        y, _ = block_of(i, SMALL, i.x)
        flat = iter(torch.autograd.grad(y, [t for group in leaves for t in group], i.dy))
        return {name: tuple(next(flat) for _ in group) for name, group in zip(names, leaves, strict=True)}

    with use_backend("torch"), use_form(form):
        some, all_of_them = grads_of(i, trained), grads_of(everything, ("x", "lora", "routers"))
    assert seen[0] == tuple(name in trained for name in ("x", "lora", "routers"))
    for name in trained:
        for grad, wanted in zip(some[name], all_of_them[name], strict=True):
            torch.testing.assert_close(grad, wanted)


def test_bad_input_teaches() -> None:
    i = mlp_inputs(SMALL)
    gate, up, down = (Projection(*args) for args in zip(i.weights, i.lora_a, i.lora_b, strict=True))
    routers = [Router(w) for w in i.router_weights]

    def run(message: str, *projections: Projection, routers: list[Router] = routers, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            mlp_block(i.x, *projections, routers, scaling=1.0, **settings)

    run("down has weight", gate, up, gate)
    run("on meta; expected one device", gate, up, down, mask=torch.ones(i.x.shape[:-1], device="meta"))
    run("weight is torch.float16", gate._replace(weight=gate.weight.half()), up, down)
    run("requires grad", gate, up, down._replace(weight=down.weight.clone().requires_grad_()))
    run("2 routers", gate, up, down, routers=routers[:2])
    run("router 2 is", gate, up, down, routers=[*routers[:2], routers[0]])
    run("top_k=3", gate, up, down, top_k=3)
    run("mask is", gate, up, down, mask=torch.ones(4))
    run("dropout_p=1.0", gate, up, down, dropout_p=1.0)
    run("needs dropout_seed", gate, up, down, dropout_p=0.5)
    wide = up._replace(lora_a=torch.zeros(6, 4), lora_b=torch.zeros(6, 6))
    run("up has the total rank 6 and gate 4", gate, wide, down)
    run(r"a bias is \(1,\)", gate, up._replace(bias=torch.zeros(1)), down)
    for biases in (dict(bias=torch.zeros(1)), dict(selection_bias=torch.zeros(3))):
        run("a bias of router 1", gate, up, down, routers=[routers[0], routers[1]._replace(**biases), routers[2]])


def test_backward_saves_less_than_autograd_does_for_the_frozen_block() -> None:
    case = MlpCase(T=64, K=32, inner=80, E=4, r=2, H=3)
    i = mlp_inputs(case)
    given = {t.data_ptr() for ts in (i.weights, i.lora_a, i.lora_b, i.router_weights, [i.x]) for t in ts}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in given:
            kept[t.data_ptr()] = t.numel()
        return t

    i.x.requires_grad_()
    with use_backend("torch"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block_of(i, case, i.x)
    limit = 64 * (2 * 80 + 3 * 8 + 2 * 3 * 4) + 64 + 1  # pre-activations, shrinks, gates and logits; mask and seed
    assert sum(kept.values()) <= limit


def test_cost_adds_up() -> None:
    forward = cost.forward(8192, 3072, 8192, 128, heads=3, experts=4)
    assert forward.base_flops == 3 * 2 * 8192 * 3072 * 8192
    assert forward.adapter_flops == 3 * 2 * 8192 * 128 * (3072 + 8192)
    backward = cost.backward(8192, 3072, 8192, 128, heads=3, experts=4)
    assert backward.adapter_flops == 2 * forward.adapter_flops
