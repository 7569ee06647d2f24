"""The router's kernels against the reference in fp64, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molora_kernels import router, use_backend
from molora_kernels.router import op, reference
from molora_kernels.testing import RouterInputs, assert_within_budget, router_inputs

pytest.importorskip("triton")
forward = importlib.import_module("molora_kernels.router.forward")
backward = importlib.import_module("molora_kernels.router.backward")

NAMES = ("gates", "sums", "counts", "dx", "dweight", "dbias")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# T, K, H, E, k: no tokens, one token, more tokens or features than one block, experts and routers that need padding
SHAPES = [
    (0, 8, 1, 4, 2),
    (1, 16, 1, 2, 1),
    (1, 1, 1, 4, 4),
    (37, 53, 3, 5, 2),
    (70, 130, 2, 8, 1),
    (33, 40, 3, 64, 8),
    (65, 200, 1, 16, 3),
    (130, 17, 7, 2, 2),
]


def by_reference(inputs: RouterInputs, top_k: int) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias) if t is not None]
    bias = None if inputs.bias is None else leaves[2]
    gates, sums, counts = reference.router(leaves[0], leaves[1], bias, inputs.selection_bias, inputs.mask, top_k)
    torch.autograd.backward([gates, sums], [inputs.dgates, inputs.dsums])
    return [gates.detach(), sums.detach(), counts, *(t.grad for t in leaves if t.grad is not None)]


def by_kernels(i: RouterInputs, top_k: int, dgates: bool = True, dsums: bool = True) -> list[Tensor]:
    gates, logits, sums, counts = forward.forward(i.x, i.weight, i.bias, i.selection_bias, i.mask, top_k)
    upstream = i.dgates if dgates else None, i.dsums if dsums else None
    return [gates, sums, counts, *backward.backward(*upstream, i.x, i.weight, logits, gates, i.mask, top_k)]


def check(inputs: RouterInputs, top_k: int) -> None:
    exact, eager = by_reference(inputs.double(), top_k), by_reference(inputs, top_k)
    for name, a, b, c in zip(NAMES, by_kernels(inputs, top_k), eager, exact, strict=False):
        assert_within_budget(a, b, c, name, roundings=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "features", "heads", "experts", "top_k"), SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_against_fp64(
    tokens: int, features: int, heads: int, experts: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = router_inputs(
        tokens, features, heads, experts, dtype=dtype, device=device, seed=tokens, bias=True,
        mask=tokens != 70, selection_bias=experts == 8,
    )  # fmt: skip
    check(inputs, top_k)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 17), label="experts")
    inputs = router_inputs(
        data.draw(st.integers(0, 80), label="tokens"),
        data.draw(st.integers(1, 150), label="features"),
        data.draw(st.integers(1, 3), label="heads"),
        experts,
        dtype=data.draw(st.sampled_from(DTYPES), label="dtype"),
        device="cuda" if torch.cuda.is_available() else "cpu",
        seed=data.draw(st.integers(0, 99), label="seed"),
        bias=True,
        mask=data.draw(st.booleans(), label="mask"),
    )
    check(inputs, data.draw(st.integers(1, min(experts, 8)), label="top_k"))


@pytest.mark.parametrize(("dgates", "dsums"), [(True, False), (False, True)])
@pytest.mark.usefixtures("poisoned")
def test_either_upstream_gradient_alone(dgates: bool, dsums: bool, device: torch.device) -> None:
    inputs = router_inputs(40, 24, 2, 4, device=device, mask=True)
    zeroed = replace(inputs, dgates=inputs.dgates * dgates, dsums=inputs.dsums * dsums)
    expected = by_kernels(zeroed, 2)
    for actual, other in zip(by_kernels(inputs, 2, dgates, dsums), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("poisoned")
def test_only_what_is_needed(device: torch.device) -> None:
    inputs = router_inputs(40, 24, 2, 4, dtype=torch.bfloat16, device=device)
    gates, logits, _, _ = forward.forward(inputs.x, inputs.weight, None, None, None, 2)
    arguments = (inputs.dgates, inputs.dsums, inputs.x, inputs.weight, logits, gates, None, 2)
    dx, dweight, dbias = backward.backward(*arguments)
    alone, *empty = backward.backward(*arguments, True, False)
    assert torch.equal(alone, dx) and not any(t.numel() for t in empty)
    empty, *alone = backward.backward(*arguments, False, True)
    assert torch.equal(alone[0], dweight) and torch.equal(alone[1], dbias) and not empty.numel()


def layouts(x: Tensor) -> dict[str, Tensor]:
    wide = torch.full((x.shape[0], 2 * x.shape[1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 1 : 2 * x.shape[1] : 2] = x
    rows = torch.full((2 * x.shape[0], x.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
    rows[::2] = x
    return {"transposed": x.T.contiguous().T, "columns": wide[:, 1 : 2 * x.shape[1] : 2], "rows": rows[::2]}


@pytest.mark.parametrize("layout", ["transposed", "columns", "rows"])
def test_strides_change_nothing(layout: str, device: torch.device) -> None:
    inputs = router_inputs(40, 70, 2, 4, dtype=torch.float16, device=device)
    strided = replace(
        inputs,
        x=layouts(inputs.x)[layout],
        weight=inputs.weight.transpose(1, 2).contiguous().transpose(1, 2),
        dgates=inputs.dgates.transpose(0, 2).contiguous().transpose(0, 2),
    )
    for a, b in zip(by_kernels(strided, 2), by_kernels(inputs, 2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(dtype: torch.dtype, device: torch.device) -> None:
    inputs = router_inputs(150, 90, 2, 4, dtype=dtype, device=device, mask=True)
    first = by_kernels(inputs, 2)
    for _ in range(100 if device.type == "cuda" else 2):
        for a, b in zip(by_kernels(inputs, 2), first, strict=True):
            assert torch.equal(a, b)


def test_ties_go_to_the_lower_index(device: torch.device) -> None:
    zeros = torch.zeros(20, 8, device=device), torch.zeros(2, 6, 8, device=device)
    gates, *_ = forward.forward(*zeros, None, None, None, 3)
    expected = torch.tensor([1, 1, 1, 0, 0, 0], device=device) / 3
    torch.testing.assert_close(gates, expected.expand(20, 2, 6))
    assert torch.equal(gates > 0, (expected > 0).expand(20, 2, 6))


@pytest.mark.parametrize("top_k", [1, 2])
def test_chosen_experts_whose_probabilities_are_zero(top_k: int, device: torch.device) -> None:
    """A selection bias may choose experts 200 nats below the best: in fp32 their probabilities are 0, and 0 / 0."""
    inputs = router_inputs(20, 8, 2, 5, device=device)
    low = torch.tensor([0.0, -200.0, 1.0, -201.0, -300.0], device=device).expand(2, 5)
    push = torch.tensor([0.0, 5.0, 0.0, 4.0, 0.0], device=device).expand(2, 5)
    check(replace(inputs, bias=low, selection_bias=push), top_k)


def test_padding_may_hold_anything(device: torch.device) -> None:
    inputs = router_inputs(50, 24, 2, 4, device=device)
    x = inputs.x.clone()
    x[31:] = float("nan")
    mask = torch.arange(50, device=device) < 31
    gates, _, sums, counts = forward.forward(x, inputs.weight, None, None, mask, 2)
    whole = forward.forward(inputs.x[:31], inputs.weight, None, None, None, 2)
    torch.testing.assert_close(gates[:31], whole[0])
    torch.testing.assert_close(sums, whole[2])
    assert torch.equal(counts, whole[3])


def test_through_the_public_function(device: torch.device) -> None:
    inputs = router_inputs(24, 16, 2, 4, device=device, bias=True)

    def grads(backend: Any) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias) if t is not None]
        with use_backend(backend):
            routing = router(leaves[0].view(4, 6, 16), leaves[1], leaves[2], top_k=2)
            loss = (routing.gates.view(24, 2, 4) * inputs.dgates).sum() + (routing.sums * inputs.dsums).sum()
        with use_backend(backend):
            return torch.autograd.grad(loss, leaves)

    for a, b in zip(grads("triton"), grads("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_operators_keep_their_contracts(device: torch.device) -> None:
    inputs = router_inputs(7, 8, 2, 4, device=device, mask=True)
    with use_backend("triton"):
        checks = ("test_schema", "test_faketensor")
        arguments = (inputs.x, inputs.weight, None, None, inputs.mask, 2)
        torch.library.opcheck(op.router_fwd, arguments, test_utils=checks)
        gates, logits, _, _ = forward.forward(*arguments)
        upstream = (inputs.dgates, inputs.dsums, inputs.x, inputs.weight, logits, gates, inputs.mask, 2)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(op.router_bwd, (*upstream, *needs), test_utils=checks)


@pytest.mark.parametrize("unsupported", ["dtype", "experts", "top_k", "columns"])
def test_what_the_kernels_do_not_take_is_explained(unsupported: str, device: torch.device) -> None:
    experts = {"experts": 65, "top_k": 16, "columns": 64}.get(unsupported, 4)
    inputs = router_inputs(3, 8, 5 if unsupported == "columns" else 1, experts, device=device)
    x = inputs.x.double() if unsupported == "dtype" else inputs.x
    with pytest.raises(ValueError, match="use backend 'torch'"):
        forward.forward(x, inputs.weight, None, None, None, 9 if unsupported == "top_k" else 2)


def decided(i: RouterInputs, top_k: int) -> Tensor:
    """(T,) bool: no fp32 arithmetic, in whatever order, can choose other experts than fp64 does.

    A sum of K products is off by ``K u sum |x w|`` at most (Higham, Accuracy and Stability, 3.1);
    u = eps for units that truncate. Nearer to a tie, there are two right answers.
    """
    bias = torch.zeros(i.weight.shape[:2]) if i.bias is None else i.bias
    x, weight, bias = i.x.double(), i.weight.double(), bias.to(i.x.device).double()
    logits = torch.einsum("tk,hek->the", x, weight) + bias
    terms = torch.einsum("tk,hek->the", x.abs(), weight.abs()) + bias.abs()
    off = (x.shape[1] + 1) * torch.finfo(torch.float32).eps * terms.amax(-1)
    ordered = logits.sort(dim=-1, descending=True).values
    return (ordered[..., top_k - 1] - ordered[..., top_k] > 2 * off).all(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "features", "heads"),
    [
        pytest.param(70, 130, 2, id="small"),
        *(pytest.param(8192, *sizes, marks=pytest.mark.gpu) for sizes in ((3072, 2), (3072, 3), (8192, 1))),
    ],
)
def test_at_the_size_of_llama_3_2_3b(
    tokens: int, features: int, heads: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Tokens near a tie are left out of the batch, and others stand in for them."""
    inputs = router_inputs(tokens * 5 // 4, features, heads, 4, dtype=dtype, device=device, bias=True, mask=True)
    keep = decided(inputs, 2).nonzero().flatten()[:tokens]
    assert len(keep) == tokens and inputs.mask is not None
    of_tokens = {name: getattr(inputs, name)[keep] for name in ("x", "mask", "dgates")}
    check(replace(inputs, **of_tokens), 2)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 1)])
def test_an_expert_whose_scores_are_nan_is_chosen(experts: int, top_k: int, device: torch.device) -> None:
    """As ``torch.topk`` does, so that a broken router shows; padding columns are never chosen in its place. The
    interpreter's argmax finds NaN by itself, so that only a GPU tells whether the kernel does."""
    inputs = router_inputs(20, 16, 1, experts, device=device)
    inputs.weight[0, 2] = float("nan")
    given = inputs.x, inputs.weight, inputs.bias, None, None, top_k
    gates, _, sums, counts = forward.forward(*given)
    for name, found, expected in zip(NAMES, (gates, sums, counts), reference.router(*given), strict=False):
        torch.testing.assert_close(found, expected, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
