"""A few tokens' experts in one call: the definition in fp64, on shapes that are no whole vectors, in both backends."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import molora_kernels
from molora_kernels import backend, use_backend
from molora_kernels.few_tokens import cpp
from molora_kernels.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("torch", "inductor")


@pytest.fixture(params=BACKENDS, autouse=True)
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "inductor" and not backend.compiler_installed():
        pytest.skip("there is no C++ compiler here")
    with use_backend(request.param):
        yield request.param


def inputs(
    tokens: int, features: int, outputs: tuple[int, ...], experts: int, rank: int, heads: int, dtype: torch.dtype
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    return {
        "x": normal(tokens, features).to(dtype),
        "outputs": [normal(tokens, n).to(dtype) for n in outputs],
        "lora_a": [normal(experts * rank, features) / features**0.5 for _ in outputs],
        "lora_b": [normal(n, experts * rank) / rank**0.5 for n in outputs],
        "router_weights": [normal(experts, features) / features**0.5 for _ in range(heads)],
        "router_biases": [0.1 * normal(experts) for _ in range(heads)],
    }


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {k: [t.double() for t in v] if isinstance(v, list) else v.double() for k, v in given.items()}


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"outputs": [y.clone() for y in given["outputs"]]}


def definition(given: dict[str, Any], top_k: int, gates: Tensor | None, scaling: float) -> tuple[list[Tensor], Any]:
    """By :func:`molora_kernels.router` and :func:`molora_kernels.grouped_lora` of the reference."""
    with use_backend("reference"):
        if given["router_weights"]:
            weight, bias = torch.stack(given["router_weights"]), torch.stack(given["router_biases"])
            gates = molora_kernels.router(given["x"], weight, bias, top_k=top_k).gates.transpose(0, 1)
        own = None if gates is None else gates.transpose(0, 1)
        added = molora_kernels.grouped_lora(
            given["x"], [], given["lora_a"], given["lora_b"], scaling=scaling, gates=own
        )
    return [y + more for y, more in zip(given["outputs"], added, strict=True)], gates


CASES: dict[str, Any] = {
    "recipe": (1, 96, (160, 160), 4, 32, 2, 2),
    "top-1": (3, 96, (160, 160), 4, 32, 2, 1),
    "shared": (5, 83, (70, 33), 4, 20, 1, 2),
    "odd": (7, 83, (1, 70, 129), 5, 3, 3, 3),
    "all chosen": (2, 16, (16,), 2, 16, 1, 2),
    "most": (64, 600, (65,), 8, 17, 1, 2),
    "no token": (0, 16, (16, 16), 4, 8, 2, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_adds_what_router_and_experts_make(case: str, dtype: torch.dtype) -> None:
    *shape, top_k = CASES[case]
    given = inputs(*shape, dtype=dtype)
    exact, exact_gates = definition(double(given), top_k, None, 0.5)
    ran, eager = copied(given), copied(given)
    gates = molora_kernels.few_tokens(**ran, top_k=top_k, scaling=0.5)
    with use_backend("torch"):
        molora_kernels.few_tokens(**eager, top_k=top_k, scaling=0.5)
    assert gates is not None and gates.dtype == torch.float32
    assert torch.equal(gates != 0, exact_gates != 0)
    torch.testing.assert_close(gates.double(), exact_gates, rtol=2e-6, atol=1e-7)
    for y, of_eager, of_exact in zip(ran["outputs"], eager["outputs"], exact, strict=True):
        assert_within_budget(y, of_eager, of_exact)


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_gates_that_are_given_and_none(heads: int) -> None:
    given = inputs(6, 83, (70, 33), 4, 20, 0, torch.float32)
    gates = None
    if heads:
        gates = torch.rand(heads, 6, 4, generator=torch.Generator().manual_seed(1))
        gates = gates * (gates > 0.4)
        gates[0, 2] = 0.0  # a token without an expert
        gates = gates.transpose(1, 2).contiguous().transpose(1, 2)
    exact, _ = definition(double(given), 1, None if gates is None else gates.double(), 2.0)
    returned = molora_kernels.few_tokens(**given, scaling=2.0, gates=gates)
    assert (returned is None) == (gates is None)
    if returned is not None and gates is not None:
        assert torch.equal(returned, gates)
    for y, of_exact in zip(given["outputs"], exact, strict=True):
        torch.testing.assert_close(y.double(), of_exact, rtol=1e-5, atol=1e-5)


def test_equal_logits_choose_the_first_experts() -> None:
    given = inputs(3, 16, (16,), 4, 8, 1, torch.float32)
    given["router_weights"][0].zero_()
    given["router_biases"][0].zero_()
    gates = molora_kernels.few_tokens(**given, top_k=2, scaling=1.0)
    assert gates is not None and gates[0].tolist() == [[0.5, 0.5, 0.0, 0.0]] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_apart_and_more_dimensions(dtype: torch.dtype) -> None:
    given = inputs(6, 40, (32, 24), 4, 8, 2, dtype)
    twice = copied(given)
    molora_kernels.few_tokens(**given, top_k=2, scaling=1.0)
    wide = torch.full((2, 3, 80), float("nan"), dtype=dtype)
    wide[..., :40] = twice["x"].view(2, 3, 40)
    twice["x"], twice["outputs"] = wide[..., :40], [y.view(2, 3, -1) for y in twice["outputs"]]
    molora_kernels.few_tokens(**twice, top_k=2, scaling=1.0)
    for y, other in zip(given["outputs"], twice["outputs"], strict=True):
        assert torch.equal(y, other.view(6, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("chosen", ["inductor"], indirect=True)  # matrix libraries promise no such thing
def test_the_same_for_any_number_of_threads(tokens: int, dtype: torch.dtype) -> None:
    given = inputs(tokens, 600, (130, 70), 4, 32, 2, dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            ran = copied(given)
            molora_kernels.few_tokens(**ran, top_k=2, scaling=1.0)
            found.append(ran["outputs"])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(y, other) for y, other in zip(found[0], others, strict=True))


def test_outputs_of_another_dtype_and_gates_of_another(chosen: str) -> None:
    given = inputs(6, 40, (32,), 4, 8, 0, torch.bfloat16)
    gates = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(1))
    wide = {**given, "outputs": [y.float() for y in given["outputs"]]}
    molora_kernels.few_tokens(**wide, scaling=1.0, gates=gates.double())
    exact, _ = definition(double(given), 1, gates.double(), 1.0)
    torch.testing.assert_close(wide["outputs"][0].double(), exact[0], rtol=1e-5, atol=1e-5)


def test_who_looks_on_sees_what_is_computed() -> None:
    """Traced, counted, mapped over or with tensors that have no memory: by operations, which all of these see."""
    given = inputs(3, 40, (32,), 4, 8, 1, torch.float32)
    weight = torch.randn(32, 40, generator=torch.Generator().manual_seed(1))

    def model(x: Tensor) -> Tensor:
        y = x @ weight.T
        molora_kernels.few_tokens(**{**given, "x": x, "outputs": [y]}, top_k=2, scaling=1.0)
        return y

    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    traced: Any = torch.jit.trace(model, (given["x"],))
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(torch.vmap(model)(x[:, None])[:, 0], model(x))
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 2 * x.numel() * 32
    with FakeTensorMode() as mode:
        fake: dict[str, Any] = {
            k: [mode.from_tensor(t) for t in v] if isinstance(v, list) else mode.from_tensor(v)
            for k, v in given.items()
        }
        molora_kernels.few_tokens(**fake, top_k=2, scaling=1.0)


def test_outputs_that_were_written_are_not_taken_for_others() -> None:
    given = inputs(3, 16, (16,), 4, 8, 1, torch.float32)
    saved = torch.randn(3, 16, requires_grad=True).sigmoid()
    with torch.no_grad():
        molora_kernels.few_tokens(**{**given, "outputs": [saved]}, top_k=2, scaling=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_a_backend_that_does_not_fit_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = inputs(3, 16, (16,), 4, 8, 1, torch.float32)
    for name in ("triton", "reference"):
        if name == "triton" and importlib.util.find_spec("triton") is None:
            continue
        with use_backend(name):
            molora_kernels.few_tokens(**given, top_k=2, scaling=1.0)


def test_which_tensors_cpp_serves(chosen: str) -> None:
    x, y, a = torch.zeros(2, 8), torch.zeros(2, 4), torch.zeros(4, 8)
    assert cpp.serves(x, [y], [a]) == (chosen == "inductor")
    for other in ((x.double(), [y.double()], [a.double()]), (x.half(), [y.half()], [a]), (x, [y], [a.double()])):
        assert not cpp.serves(*other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_b": []}, "1 outputs, 1 lora_a, 0 lora_b"),
        ({"router_biases": []}, "1 router_weights, 0 router_biases; expected as many"),
        ({"gates": torch.zeros(1, 3, 4)}, "1 router_weights, 1 router_biases and gates"),
        ({"router_weights": [torch.zeros(4, 9)]}, r"a router is \(4, 9\) and \(4,\); expected \(4, 16\)"),
        ({"top_k": 5}, "top_k=5"),
        ({"top_k": 0}, "top_k=0"),
        ({"lora_a": [torch.zeros(30, 16)]}, "a total rank of 30"),
        ({"lora_a": [torch.zeros(32, 17)]}, r"A \(32, 17\)"),
        ({"outputs": [torch.zeros(2, 16)]}, r"an output is \(2, 16\)"),
        ({"outputs": [torch.zeros(16, 3).T]}, r"strides \(1, 3\); expected it contiguous"),
        ({"lora_b": [torch.zeros(16, 32, dtype=torch.bfloat16)]}, "bfloat16 and the first torch.float32"),
        ({"lora_b": [torch.zeros(16, 32, requires_grad=True)]}, "has no gradient"),
        ({"router_weights": [], "router_biases": [], "gates": torch.zeros(1, 2, 4)}, r"gates are \(1, 2, 4\)"),
        ({"lora_b": [torch.zeros(16, 32, device="meta")]}, "expected one device"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = inputs(3, 16, (16,), 4, 8, 1, torch.float32) | {"top_k": 2} | change
    with pytest.raises(ValueError, match=message):
        molora_kernels.few_tokens(**given, scaling=1.0)
