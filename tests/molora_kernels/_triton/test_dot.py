"""The terms into which fp32 operands are split lose nothing, and long sums of them are rounded to nearest."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from molora_kernels._triton.dot import bf16_terms, tf32_terms  # noqa: E402


@triton.jit
def terms_kernel(p_x, p_terms, N: tl.constexpr, BF16: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(p_x + o)
    if BF16:
        b_high, b_middle, b_low = bf16_terms(b_x)
    else:
        b_high, b_middle, b_low = tf32_terms(b_x)
    tl.store(p_terms + o, b_high.to(tl.float32))
    tl.store(p_terms + N + o, b_middle.to(tl.float32))
    tl.store(p_terms + 2 * N + o, b_low.to(tl.float32))


@pytest.mark.parametrize("bf16", [True, False])
def test_terms_add_up_exactly(bf16: bool, device: torch.device) -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 1024)
    x = torch.cat([x[:-2], torch.tensor([0.0, -1.0])]).to(device)
    terms = torch.full((3, 1024), float("nan"), device=device)
    terms_kernel[(1,)](x, terms, N=1024, BF16=bf16)
    assert torch.equal(terms.double().sum(0), x.double())
    if bf16:
        assert torch.equal(terms.bfloat16().float(), terms)
    else:  # tf32 keeps the upper 10 bits of the mantissa
        assert not (terms.view(torch.int32) & 0x1FFF).any()


COMPILE = """
import sys
from importlib import import_module
from bench.compile import compile_case
module, arch, kernel, label = sys.argv[1:]
(case,) = (
    case for case in import_module(module).compile_cases((int(arch[:-1]), int(arch[-1])))
    if (case.kernel.__name__, case.label) == (kernel, label)
)
print(compile_case(case, arch).asm["ttgir"])
"""


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize(
    ("module", "kernel", "label"),
    [
        ("router.forward", "router_fwd_kernel", "bf16 H=2 E=4 k=2"),
        ("router.forward", "router_fwd_kernel", "fp16 H=2 E=4 k=2"),
        ("router.backward", "router_bwd_kernel", "bf16 C=8 without dx"),
    ],
)
def test_tensor_cores_add_to_no_long_sum(module: str, kernel: str, label: str, arch: str) -> None:
    """What a loop carries is added to by an fp32 addition: a tensor core would truncate at every step. Nothing but the
    compiled code shows it, and neither the interpreter nor a small case does."""
    pytest.importorskip("triton.backends.nvidia")
    command = [sys.executable, "-c", COMPILE, f"molora_kernels.{module}", arch, kernel, label]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (loop,) = (line for line in done.stdout.splitlines() if "scf.for" in line and "xf32" in line)
    carried = set(re.findall(r"(%\w+) = ", loop.split("iter_args", 1)[1]))
    name = r"(%[\w#]+)"
    accumulators = re.findall(rf"(?:tt\.dot|ttng\.warp_group_dot) {name}, {name}, {name}", done.stdout)
    assert len(accumulators) == 3
    assert not carried & {accumulator for _, _, accumulator in accumulators}
    sums = re.findall(rf"arith\.addf {name}, {name} : tensor<\d+x\d+xf32, #mma", done.stdout)
    assert any(carried & set(operands) for operands in sums)
