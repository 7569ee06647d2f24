"""The router's definition, and the PyTorch backend against it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from molora_kernels import Routing, router, use_backend
from molora_kernels.backend import compiler_installed
from molora_kernels.router import op, portable, reference
from molora_kernels.testing import RouterInputs, assert_within_budget, router_inputs


@pytest.fixture(autouse=True)
def _torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(not compiler_installed(), reason="there is no C++ compiler here")
)
SHAPES = [(1, 8, 1, 2, 1), (5, 7, 1, 4, 2), (33, 16, 2, 4, 2), (300, 9, 3, 5, 3), (17, 12, 2, 64, 8), (6, 5, 1, 4, 4)]


def run(inputs: RouterInputs, top_k: int, backend: str) -> list[Tensor]:
    """Gates, sums, counts, then the gradients of x, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.x, inputs.weight)]
    leaves += [] if inputs.bias is None else [inputs.bias.detach().clone().requires_grad_()]
    with use_backend(backend):
        routing = router(
            leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None,
            top_k=top_k, mask=inputs.mask, selection_bias=inputs.selection_bias,
        )  # fmt: skip
        torch.autograd.backward([routing.gates, routing.sums], [inputs.dgates, inputs.dsums])
    return [*(t.detach() for t in routing), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("backend", ["torch", INDUCTOR])
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"mask": True}, {"bias": True, "selection_bias": True}])
@pytest.mark.parametrize(("tokens", "features", "heads", "experts", "top_k"), SHAPES)
def test_portable_backends_against_reference(
    tokens: int, features: int, heads: int, experts: int, top_k: int, extras: dict[str, bool], backend: str
) -> None:
    inputs = router_inputs(tokens, features, heads, experts, seed=tokens, **extras)
    exact = run(inputs.double(), top_k, "reference")
    for actual, expected in zip(run(inputs.double(), top_k, backend), exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    eager = run(inputs, top_k, "reference")
    names = ("gates", "sums", "counts", "dx", "dweight", "dbias")
    for name, a, b, c in zip(names, run(inputs, top_k, backend), eager, exact, strict=False):
        assert_within_budget(a, b, c, name, roundings=8)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_reference_gradients_are_those_of_its_values(top_k: int) -> None:
    inputs = router_inputs(6, 5, 2, 4, bias=True, mask=True).double()
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias) if t is not None]
    assert torch.autograd.gradcheck(
        lambda x, w, b: reference.router(x, w, b, None, inputs.mask, top_k)[:2], leaves, eps=1e-6, atol=1e-7
    )


def losses(routing: Routing, tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    """(z-loss, load balance) per router, as the docstring of ``router`` forms them."""
    experts = routing.counts.shape[1]
    balance = experts * (routing.counts / (top_k * tokens) * routing.sums[:, 1:] / tokens).sum(1)
    return routing.sums[:, 0] / tokens, balance


@pytest.mark.parametrize("backend", ["torch", INDUCTOR, "reference"])
def test_vectors_of_the_losses(backend: str) -> None:
    """E = 4, k = 2: zero logits; balanced choices; all tokens on the same two experts with probability 1/2 each."""
    with use_backend(backend):
        z, _ = losses(router(torch.randn(12, 8), torch.zeros(1, 4, 8), top_k=2), 12, 2)
        assert z.item() == pytest.approx(math.log(4) ** 2, rel=1e-6)

        one_hot = torch.eye(4).repeat(3, 1)  # token t prefers experts t and t + 1: each is chosen equally often
        weight = (2 * torch.eye(4) + torch.eye(4).roll(1, 0))[None]
        _, balance = losses(router(one_hot, weight, top_k=2), 12, 2)
        assert balance.item() == pytest.approx(1.0, rel=1e-6)

        far = torch.tensor([[30.0, 30.0, -30.0, -30.0]])
        _, balance = losses(router(torch.zeros(12, 8), torch.zeros(1, 4, 8), far, top_k=2), 12, 2)
        assert balance.item() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", INDUCTOR, "reference"])
def test_ties_go_to_the_lower_index(backend: str) -> None:
    with use_backend(backend):
        gates = router(torch.zeros(3, 8), torch.zeros(2, 6, 8), top_k=2).gates
    assert torch.equal(gates, torch.tensor([0.5, 0.5, 0, 0, 0, 0]).expand(3, 2, 6))


@pytest.mark.parametrize("backend", ["torch", INDUCTOR, "reference"])
def test_one_expert_keeps_its_probability_and_trains_its_router(backend: str) -> None:
    inputs = router_inputs(9, 8, 1, 4)
    weight = inputs.weight.clone().requires_grad_()
    with use_backend(backend):
        gates = router(inputs.x, weight, top_k=1).gates
        (grad,) = torch.autograd.grad(gates, weight, inputs.dgates)
    probs = torch.softmax(inputs.x @ inputs.weight[0].T, -1)
    torch.testing.assert_close(gates.sum(-1)[:, 0], probs.max(-1).values)
    assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["torch", INDUCTOR, "reference"])
def test_chosen_gates_sum_to_one_and_selection_bias_only_selects(backend: str) -> None:
    inputs = router_inputs(11, 8, 1, 4)
    push = torch.tensor([[0.0, 0.0, 0.0, 10.0]])
    with use_backend(backend):
        gates = router(inputs.x, inputs.weight, top_k=2, selection_bias=push).gates[:, 0]
    probs = torch.softmax(inputs.x @ inputs.weight[0].T, -1)
    assert (gates[:, 3] > 0).all() and ((gates > 0).sum(-1) == 2).all()
    torch.testing.assert_close(gates, torch.where(gates > 0, probs, 0) / (probs * (gates > 0)).sum(-1, keepdim=True))


def test_padding_may_hold_anything() -> None:
    inputs = router_inputs(10, 8, 2, 4)
    x = inputs.x.clone()
    x[6:] = float("nan")
    mask = torch.arange(10) < 6
    whole, padded = router(inputs.x[:6], inputs.weight, top_k=2), router(x, inputs.weight, top_k=2, mask=mask)
    torch.testing.assert_close(padded.sums, whole.sums)
    assert torch.equal(padded.counts, whole.counts)


def test_leading_shape_and_no_tokens() -> None:
    inputs = router_inputs(12, 8, 2, 4)
    routing = router(inputs.x.view(3, 4, 8), inputs.weight, top_k=2, mask=torch.ones(3, 4))
    assert routing.gates.shape == (3, 4, 2, 4) and not routing.counts.requires_grad
    empty = router(inputs.x[:0], inputs.weight, top_k=2)
    assert empty.gates.shape == (0, 2, 4) and not empty.sums.any() and not empty.counts.any()


BAD = {
    "features": (dict(x=torch.zeros(3, 9)), "expected"),
    "weight": (dict(weight=torch.zeros(4, 8)), "expected"),
    "top_k": (dict(top_k=5), "top_k=5"),
    "none": (dict(top_k=0), "top_k=0"),
    "bias": (dict(bias=torch.zeros(4)), "bias is"),
    "selection": (dict(selection_bias=torch.zeros(2, 4)), "selection_bias is"),
    "mask": (dict(mask=torch.ones(4)), "mask is"),
    "device": (
        dict(mask=torch.ones(3, device="meta")),
        "x is on cpu and another tensor, .* on meta; expected one device",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_explained(case: str) -> None:
    changed, message = BAD[case]
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(1, 4, 8), "top_k": 2, **changed}
    with pytest.raises(ValueError, match=message):
        router(**arguments)


def test_operators_keep_their_contracts() -> None:
    inputs = router_inputs(7, 8, 2, 4, bias=True, mask=True)
    x, weight, bias = (t.clone().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias) if t is not None)
    torch.library.opcheck(op.router_fwd, (x, weight, bias, None, inputs.mask, 2))
    gates, logits, _, _ = portable.forward(inputs.x, [*inputs.weight], [*inputs.bias], [], inputs.mask, 2)
    upstream = (inputs.dgates, inputs.dsums, inputs.x, inputs.weight, logits, gates, inputs.mask, 2)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(op.router_bwd, (*upstream, *needs))


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_only_what_is_trained_gets_a_gradient(trained: tuple[bool, bool]) -> None:
    inputs = router_inputs(7, 8, 2, 4)
    leaves = [t.clone().requires_grad_(flag) for t, flag in zip((inputs.x, inputs.weight), trained, strict=True)]
    torch.autograd.backward(router(*leaves, top_k=2).gates, inputs.dgates)
    assert tuple(leaf.grad is not None for leaf in leaves) == trained


def test_compiles_without_a_graph_break() -> None:
    inputs = router_inputs(7, 8, 2, 4)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        routing = router(x, weight, top_k=2)
        return (routing.gates * inputs.dgates).sum() + (routing.sums * inputs.dsums).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, weight = inputs.x.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(x, weight), (x, weight)))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)
