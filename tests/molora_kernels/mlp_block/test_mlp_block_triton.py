"""The SwiGLU block's kernels against the reference in fp64, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlp_cases import CASES, DTYPES, MlpCase, check, mlp_inputs, results
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from molora_kernels import Projection, Router, mlp_block, use_backend, use_form
from molora_kernels.grouped_lora.dispatch import Form
from molora_kernels.testing import assert_within_budget

pytest.importorskip("triton")
forward = importlib.import_module("molora_kernels.mlp_block.forward")
backward = importlib.import_module("molora_kernels.mlp_block.backward")
total = importlib.import_module("molora_kernels._triton.total")


GROUPED = [("grouped", torch.float16), ("grouped", torch.bfloat16)]


@pytest.mark.parametrize(("form", "dtype"), [*(("dense", d) for d in DTYPES), *GROUPED], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_against_fp64(case: MlpCase, form: Form, dtype: torch.dtype, device: torch.device) -> None:
    check(mlp_inputs(case, dtype, device), case, "triton", form)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype"), [*(("dense", d) for d in DTYPES), GROUPED[0]], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_several_tiles_in_every_dimension(form: Form, dtype: torch.dtype, device: torch.device) -> None:
    """So that loops have more than one step, and programs neighbours to race with, in tokens, features and ranks."""
    case = MlpCase(T=290, K=270, inner=290, E=4, r=40, H=3, bias=True, p=0.05)
    if dtype == torch.float32:  # whose tiles are a quarter
        case = replace(case, T=140, K=140, inner=150, r=20)
    check(mlp_inputs(case, dtype, device), case, "triton", form)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 70),
    K=st.integers(1, 40),
    inner=st.integers(1, 50),
    E=st.integers(1, 9),
    r=st.integers(1, 5),
    H=st.sampled_from([0, 1, 3]),
    p=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(T: int, K: int, inner: int, E: int, r: int, H: int, p: float, dtype: torch.dtype) -> None:
    case = MlpCase(T=T, K=K, inner=inner, E=E, r=r, H=H, top_k=min(2, E), p=p)
    check(mlp_inputs(case, dtype, "cuda" if torch.cuda.is_available() else "cpu"), case, "triton")


def swiglu_of(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
    """h, and the gradients of gate and up."""
    gate, up = gate.requires_grad_(), up.requires_grad_()
    h = F.silu(gate) * up
    return h.detach(), *torch.autograd.grad(h, (gate, up), dh)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_swiglu(dtype: torch.dtype, device: torch.device) -> None:
    gate, up, dh = (torch.randn(37, 53, device=device).mul_(s).to(dtype) for s in (4.0, 1.0, 1.0))
    exact, eager = (swiglu_of(*(t.clone().to(d) for t in (gate, up, dh))) for d in (torch.float64, dtype))
    h, *grads = backward.swiglu_backward(gate, up, dh.clone(), need_h=True)
    assert torch.equal(h, forward.swiglu(gate, up))
    for name, found, by_eager, wanted in zip(("h", "dgate", "dup"), (h, *grads), eager, exact, strict=True):
        assert_within_budget(found, by_eager, wanted, name)
    without, *same = backward.swiglu_backward(gate, up, dh.clone(), need_h=False)
    assert not without.numel() and all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


@pytest.mark.usefixtures("poisoned")
def test_chosen_experts_whose_probabilities_are_zero(device: torch.device) -> None:
    """The router that rides along, with a selection bias that chooses experts 200 nats below the best."""
    case = MlpCase(T=20, K=16, inner=24, E=4, r=2, H=3, bias=True)
    inputs = mlp_inputs(case, torch.float16, device)
    low = torch.tensor([0.0, -200.0, -201.0, 1.0], device=device)
    push = torch.tensor([0.0, 20.0, 10.0, 0.0], device=device)
    check(replace(inputs, router_biases=[low] * 3, selection_biases=[push] * 3), case, "triton")


@pytest.mark.parametrize(("form", "dtype"), [*(("dense", d) for d in DTYPES), *GROUPED[:1]], ids=str)
def test_repeats_bit_for_bit(form: Form, dtype: torch.dtype, device: torch.device) -> None:
    case = replace(CASES[-1], T=150)
    inputs = mlp_inputs(case, dtype, device)
    first, again = results(inputs, case, "triton", form), results(inputs, case, "triton", form)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("H", "form"), [(0, "dense"), (1, "dense"), (3, "dense"), (1, "grouped"), (3, "grouped")])
@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_only_what_is_needed_is_computed(
    dtype: torch.dtype, need: tuple[bool, bool, bool], H: int, form: Form, device: torch.device
) -> None:
    i = mlp_inputs(MlpCase(T=9, K=8, inner=12, E=3, r=2, H=H), dtype, device)
    lists = (i.weights, i.biases, i.lora_a, i.lora_b, i.router_weights, i.router_biases, i.selection_biases)
    *_, saved = forward.forward(i.x, *lists, i.mask, None, 2, 2.0, 0.0, form)
    arguments = (
        i.dy, i.dsums if H else None, i.x, i.weights, i.lora_a, i.lora_b, i.router_weights, saved, i.mask, None,
        2, 2.0, 0.0,
    )  # fmt: skip
    everything = backward.backward(*arguments, True, True, True, form)
    some = backward.backward(*arguments, *need, form)
    need_dx, need_dlora, need_drouter = need
    assert torch.equal(some[0], everything[0]) if need_dx else some[0].numel() == 0
    for needed, all_of_them, parts in zip(
        (need_dlora, need_dlora, need_drouter, need_drouter), everything[1:], some[1:], strict=True
    ):
        assert len(parts) == (len(all_of_them) if needed else 0)
        assert all(torch.equal(a, b) for a, b in zip(all_of_them, parts, strict=False))


@pytest.mark.parametrize("H", [3, 0])
def test_sums_and_casts_are_one_launch_each(H: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch for each adapter would be most of what they cost (docs/log.md)."""
    launched: list[int] = []
    plan_of = total.plan_of
    monkeypatch.setattr(total, "plan_of", lambda groups, *how: (launched.append(len(groups)), plan_of(groups, *how))[1])
    case = MlpCase(T=9, K=8, inner=12, E=3, r=2, H=H)
    results(mlp_inputs(case, torch.bfloat16, device), case, "triton")
    # The adapters of gate and up are joined, and their routers' weights and biases; down's own bias is as it is, its B
    # is cast where y is made. Then the same for backward, without biases; then gradients, of routers too.
    assert launched == [4 + H, 1, 5 + (2 if H else 0), 6 + H]


def test_launches_are_those_of_the_readme(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel by kernel, and products and sums of PyTorch's."""
    launched: Counter[str] = Counter()
    kind = type(forward.swiglu_fwd_kernel)  # the interpreter's or the compiler's
    run = kind.run
    monkeypatch.setattr(
        kind, "run", lambda k, *a, **how: (launched.update([f"`{k.fn.__name__}`"]), run(k, *a, **how))[1]
    )

    class Torchs(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm", "addmm_", "sum"):
                launched["`Tensor.sum`" if name == "sum" else "matrix library"] += 1
            return func(*args, **(kwargs or {}))

    i = mlp_inputs(MlpCase(T=40, K=32, inner=48, E=4, r=8, H=3, bias=True), torch.bfloat16, device)
    lists = (i.weights, i.biases, i.lora_a, i.lora_b, i.router_weights, i.router_biases, i.selection_biases)
    with Torchs():
        h, *_, saved = forward.forward(i.x, *lists, i.mask, None, 2, 2.0, 0.0, "dense")
        forward.down(h, saved[3], saved[6], i.weights[2], i.biases[2] if i.biases else None, i.lora_b[2], 2.0)
        given = (i.weights, i.lora_a, i.lora_b, i.router_weights, saved, i.mask, None, 2, 2.0, 0.0)
        backward.backward(i.dy, i.dsums, i.x, *given, True, True, True, "dense")
    assert launched == launches_written(Path(forward.__file__).with_name("README.md"))


def launches_written(page: Path) -> Counter[str]:
    """The second column of the tables of launches: names with commas between, each followed by how often."""
    written: Counter[str] = Counter()
    times = {"twice": 2} | {f"{n} times": n for n in range(3, 9)}
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|[^|]*\|[^|]*\|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for row in rows:
        name = ""
        for word in row.strip().split(", "):
            if word in times:
                written[name] += times[word] - 1
            elif word.startswith("`") or word == "matrix library":
                written[name := word] += 1
    return written


REAL = MlpCase(T=8192, K=3072, inner=8192, E=4, r=32, H=3, p=0.08)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_shapes_on_the_gpu(dtype: torch.dtype, H: int) -> None:
    case = replace(REAL, H=H, T=2048)  # the reference in fp64 has to fit too
    check(mlp_inputs(case, dtype, "cuda"), case, "triton")


@pytest.mark.gpu
def test_a_hundred_runs_are_one_on_the_gpu() -> None:
    inputs = mlp_inputs(REAL, torch.bfloat16, "cuda")
    first = results(inputs, REAL, "triton")
    for _ in range(99):
        again = results(inputs, REAL, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["dense", "grouped"])
def test_small_for_the_sanitizer(form: Form) -> None:
    """Sizes that no tile divides, few enough for compute-sanitizer: router, adapters and block in one."""
    case = MlpCase(T=150, K=136, inner=200, E=5, r=16, H=3, p=0.1)
    check(mlp_inputs(case, torch.bfloat16, "cuda"), case, "triton", form)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["dense", "grouped"])
def test_compiles_without_a_graph_break_on_the_gpu(form: Form) -> None:
    case = replace(REAL, T=256, K=512, inner=1024)
    i = mlp_inputs(case, torch.bfloat16, "cuda")
    x = i.x.requires_grad_()
    projections = [Projection(*args) for args in zip(i.weights, i.lora_a, i.lora_b, strict=True)]
    routers = [Router(*args) for args in zip(i.router_weights, i.selection_biases, strict=True)]

    def run(x: torch.Tensor) -> torch.Tensor:
        out = mlp_block(x, *projections, routers, top_k=2, scaling=2.0, dropout_p=case.p, dropout_seed=i.dropout_seed)
        return (out.y * i.dy).float().sum() + out.sums.sum()

    with use_backend("triton"), use_form(form):
        eager = torch.autograd.grad(run(x), x)[0]
        compiled = torch.autograd.grad(torch.compile(run, fullgraph=True)(x), x)[0]
    assert torch.equal(compiled, eager)


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    case = replace(REAL, T=1024)
    inputs = mlp_inputs(case, torch.bfloat16, "cuda")
    eager = results(inputs, case, "triton")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # allocations and compilation happen before the capture
        results(inputs, case, "triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(inputs, case, "triton")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(eager[name], captured[name]) for name in eager)
