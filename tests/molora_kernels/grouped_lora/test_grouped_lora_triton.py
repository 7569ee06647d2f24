"""The kernels of grouped LoRA against the reference in fp64, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import CASES, DTYPES, LoraCase, check, lora_inputs, results

from molora_kernels.grouped_lora.dispatch import Form
from molora_kernels.testing import assert_within_budget

pytest.importorskip("triton")
forward = importlib.import_module("molora_kernels.grouped_lora.forward")
backward = importlib.import_module("molora_kernels.grouped_lora.backward")
gating = importlib.import_module("molora_kernels.grouped_lora.gating")
tiles = importlib.import_module("molora_kernels.grouped_lora.tiles")
shared_memory_kib = importlib.import_module("molora_kernels._triton.tiles").shared_memory_kib

FORMS: tuple[Form, ...] = ("dense", "grouped")
CAPABILITIES = [None, (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_against_fp64(case: LoraCase, form: Form, dtype: torch.dtype, device: torch.device) -> None:
    check(lora_inputs(case, dtype, device), "triton", form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_masters_in_the_dtype_of_x(dtype: torch.dtype, device: torch.device) -> None:
    check(lora_inputs(CASES[2], dtype, device, masters=dtype), "triton")


@pytest.mark.usefixtures("poisoned")
def test_shrink_of_several_blocks(device: torch.device) -> None:
    check(lora_inputs(LoraCase(T=20, K=24, N=(9,), E=10, r=30, H=1), torch.float16, device), "triton")


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 70),
    K=st.integers(1, 70),
    N=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    E=st.integers(1, 9),
    r=st.integers(1, 9),
    shared=st.sampled_from([None, True, False]),
    p=st.sampled_from([0.0, 0.4]),
)
def test_any_shape(T: int, K: int, N: list[int], E: int, r: int, shared: bool | None, p: float) -> None:
    H = 0 if shared is None else 1 if shared else len(N)
    case = LoraCase(T=T, K=K, N=tuple(N), E=E if H else 1, r=r, H=H, chosen=min(2, E), p=p)
    check(lora_inputs(case, device="cuda" if torch.cuda.is_available() else "cpu"), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    inputs = lora_inputs(replace(CASES[-1], T=180), dtype, device)
    first = results(inputs, "triton")
    again = results(inputs, "triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_only_what_is_needed_is_computed(need: tuple[bool, bool, bool], device: torch.device) -> None:
    i = lora_inputs(LoraCase(T=9, K=12, N=(5, 6), E=2, r=3, H=2), device=device)
    s = torch.randn(9, 12, device=device)
    arguments = (i.dys, i.x, i.weights, i.lora_a, i.lora_b, i.gates, s, None, 2.0, 0.0, 0)
    everything, some = backward.backward(*arguments, True, True, True), backward.backward(*arguments, *need)
    need_dx, need_dlora, need_dgates = need
    for needed, all_of_it, part in zip(
        (need_dx, need_dlora, need_dgates), everything[:2] + everything[3:], some[:2] + some[3:], strict=True
    ):
        assert torch.equal(part, all_of_it) if needed else part.numel() == 0
    assert len(some[2]) == (2 if need_dlora else 0)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_fit_in_shared_memory(dtype: torch.dtype, capability: tuple[int, int] | None) -> None:
    limit = shared_memory_kib(capability) * 1024
    for P in (1, 8, 32, 96, 128, 256, 1024):
        for Q in (0, 16, 32, 64):
            shrink, weight = (f(P, Q, dtype, capability) for f in (tiles.shrink_tiles, tiles.weight_tiles))
            inputs = tiles.input_tiles(P, dtype, capability)
            # one stage holds both operands and the router's
            for t, step in (
                (shrink, (shrink.block_t + shrink.block_n) * shrink.block_k),
                (weight, (weight.block_k + weight.block_n) * weight.block_t),
                (inputs, (inputs.block_t + inputs.block_k) * inputs.block_n),
            ):
                assert t.num_stages >= 1
                assert step * dtype.itemsize + 4 * Q * max(t.block_k, t.block_t) <= limit
                assert all(n & (n - 1) == 0 for n in (t.block_t, t.block_k, t.block_n))


def test_splits_of_the_tokens() -> None:
    tile = tiles.weight_tiles(256, 0, torch.bfloat16, (9, 0))
    assert tiles.weight_splits(8192, 256, 3072, tile) == 5  # 24 blocks of features: 120 programs
    assert tiles.weight_splits(8192, 256, 8192, tile) == 4  # 64 blocks
    assert tiles.weight_splits(8192, 256, 1024, tile) == 16  # 8 blocks, and more terms for want of programs
    assert tiles.weight_splits(1, 256, 3072, tile) == 1
    assert tiles.weight_splits(0, 256, 3072, tile) == 1


@pytest.mark.parametrize("form", FORMS)
def test_offsets_beyond_an_int32(form: Form, device: torch.device) -> None:
    """Three rows, 2^30 elements apart: the third is out of a 32-bit offset's reach. Memory that nobody touches is free
    on a CPU; on a GPU it is 4 GiB for each of two tensors. cuBLAS, which cannot, gets a copy; the kernels can."""

    def far(rows: torch.Tensor) -> torch.Tensor:
        apart = 2**30 + 16
        memory = torch.empty(2 * apart + rows.shape[1], dtype=rows.dtype, device=device)
        return memory.as_strided(rows.shape, (apart, 1)).copy_(rows)

    if form == "dense":
        x, a, left = (torch.randn(*size, device=device).half() for size in ((3, 16), (5, 16), (3, 5)))
        distant_x = far(x)
        assert forward.rows_contiguous(x) is x and forward.rows_contiguous(distant_x).is_contiguous()
        assert torch.equal(forward.shrink(distant_x, a, None, 0.0, 0), forward.shrink(x, a, None, 0.0, 0))
        for near, there in zip(*(backward.weight_terms(t, left, None) for t in (x, distant_x)), strict=True):
            assert torch.equal(near, there)
    inputs = lora_inputs(LoraCase(T=3, K=16, N=(16,), E=3, r=4, H=1, p=0.2), torch.float16, device)
    distant = replace(inputs, x=far(inputs.x), dys=[far(dy) for dy in inputs.dys])
    check(inputs, "triton", form, given=distant)


REAL = [
    LoraCase(T=8192, K=3072, N=(8192, 8192), E=4, r=32, H=2, p=0.08),
    LoraCase(T=8192, K=8192, N=(3072,), E=4, r=32, H=1, p=0.08),
    LoraCase(T=8191, K=3072, N=(3072, 1024, 1024), E=1, r=32, H=0, p=0.05),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_shapes_on_the_gpu(case: LoraCase, dtype: torch.dtype) -> None:
    check(lora_inputs(case, dtype, "cuda"), "triton")


@pytest.mark.gpu
def test_a_hundred_runs_are_one_on_the_gpu() -> None:
    inputs = lora_inputs(REAL[0], torch.bfloat16, "cuda")
    first = results(inputs, "triton")
    for _ in range(99):
        again = results(inputs, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    inputs = lora_inputs(replace(REAL[0], T=1024), torch.bfloat16, "cuda")
    eager = results(inputs, "triton")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # allocations and compilation happen before the capture
        results(inputs, "triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(inputs, "triton")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(eager[name], captured[name]) for name in eager)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(LoraCase(T=300, K=40, N=(24,), E=4, r=4, H=1), id="small"),
        pytest.param(LoraCase(T=300_000, K=8192, N=(64,), E=8, r=8, H=1), id="x and dx", marks=pytest.mark.gpu),
        pytest.param(LoraCase(T=300_000, K=64, N=(8192,), E=8, r=8, H=1), id="y and dy", marks=pytest.mark.gpu),
    ],
)
def test_more_elements_than_an_int32_counts(case: LoraCase, form: Form, device: torch.device) -> None:
    """The same 100 rows over and over, so that the reference knows those beyond 2^31 elements from one block of them.
    The small case runs everywhere: that the test itself is right. Not bit for bit what the block alone gives: cuBLAS
    picks its tiles by the number of rows."""
    if case.T > 1000 and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    block, repeats = lora_inputs(replace(case, T=100), torch.bfloat16, device), case.T // 100
    assert block.gates is not None
    whole = replace(
        block,
        x=block.x.repeat(repeats, 1),
        gates=block.gates.repeat(repeats, 1, 1),
        dys=[dy.repeat(repeats, 1) for dy in block.dys],
    )
    exact, eager = results(block.double(), "reference"), results(block, "reference")
    for name, actual in results(whole, "triton", form).items():
        of_rows = name in ("y0", "dx", "dgates")
        for found in (actual[:100], actual[-100:]) if of_rows else (actual / repeats,):
            roundings = round(2 * torch.finfo(torch.bfloat16).eps / torch.finfo(found.dtype).eps)
            assert_within_budget(found, eager[name], exact[name], name, roundings=roundings)
