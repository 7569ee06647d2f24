"""Passes compiled to loops: when they are, and what happens where that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from molora_kernels import backend, use_backend
from molora_kernels.cpu import has_amx, has_bf16_pairs
from molora_kernels.one_pass import LEAST_ELEMENTS, compiled, one_pass

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not backend.compiler_installed(), reason="there is no C++ compiler here")


def doubling() -> Any:
    """A pass of its own, that nothing has compiled yet."""

    @one_pass(rows=2)
    def double(x: Tensor, out: Tensor, factor: float) -> None:
        out.copy_(x * factor)

    return double


def test_it_is_compiled_for_a_large_matrix_on_a_cpu_with_a_compiler() -> None:
    many, few = torch.zeros(LEAST_ELEMENTS // 4, 4), torch.zeros(LEAST_ELEMENTS // 4 - 1, 4)
    with use_backend("inductor"):
        assert compiled(many) and not compiled(few)
        with torch.inference_mode():
            assert not compiled(many)
    with use_backend("torch"):
        assert not compiled(many)


@pytest.mark.parametrize("name", ["torch", "inductor"])
def test_rows_at_a_time_or_all_at_once(name: Any) -> None:
    x, out = torch.randn(512, LEAST_ELEMENTS // 512), torch.full((512, LEAST_ELEMENTS // 512), float("nan"))
    with use_backend(name):
        doubling()(x, out, 2.0)
    assert torch.equal(out, x * 2)


BROKEN = """#!/bin/sh
case "$*" in *--version*|*-dumpversion*) exec g++ "$@" ;; esac
echo cannot compile this >&2
exit 1
"""
PROGRAM = """
import sys, torch
from molora_kernels import backend, use_backend
from molora_kernels.one_pass import LEAST_ELEMENTS, one_pass

@one_pass(rows=2)
def double(x, out, factor):
    out.copy_(x * factor)

x = torch.randn(LEAST_ELEMENTS // 4, 4)
out = torch.empty_like(x)
with use_backend(sys.argv[1]):
    for _ in range(2):
        double(x, out, 2.0)
        assert torch.equal(out, x * 2)
    print(backend.backend_for(x.device))
"""


@pytest.mark.parametrize("name", ["auto", "inductor"])
@pytest.mark.parametrize("broken", [True, False])
def test_where_compiling_fails_auto_goes_on_without_and_says_so_once(broken: bool, name: str, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(BROKEN, encoding="utf-8")
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler) if broken else "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if name == "auto":
        assert ran.returncode == 0 and ran.stdout == "torch\n", ran.stderr
        assert ran.stderr.count("compiling failed, so from here on it is 'torch' on cpu") == 1
    else:
        assert ran.returncode == 1 and ("cannot compile this" if broken else "No working C++ compiler") in ran.stderr


def test_where_compiling_fails_one_of_several_processes_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may have compiled, and would round otherwise."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with use_backend("auto"):
        with pytest.raises(
            RuntimeError, match=r"failed in process 1, and 2 .* mend the C\+\+ compiler.*kernels.backend=torch"
        ):
            backend.without_compiler(OSError("cannot compile this"))
        assert backend.backend_for(torch.device("cpu")) == "inductor"


def test_what_decides_kernels_and_tiles_has_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("torch"):
        found = backend.decided_by(torch.device("cpu"))
    of_cpu = {"vectors": torch.backends.cpu.get_cpu_capability(), "AMX": has_amx(), "AVX512-BF16": has_bf16_pairs()}
    assert found == {"device": "cpu", "backend": "torch", **of_cpu, "TRITON_INTERPRET": "1"}


def test_no_compiler_is_said_when_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("inductor"), pytest.raises(RuntimeError, match="is for CPUs"):
        backend.backend_for(torch.device("cuda"))
    monkeypatch.setattr(backend, "compiler_installed", lambda: False)
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        use_backend("inductor")
    with use_backend("auto"):
        assert backend.backend_for(torch.device("cpu")) == "torch"


def test_torch_has_nothing_to_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two names for the same question one is logged as unclear, once in each process that trains."""
    asked: list[str] = []
    monkeypatch.setattr(torch.fx._symbolic_trace, "is_fx_tracing_warning", lambda: asked.append("is_fx_tracing"))
    compiled(torch.ones(LEAST_ELEMENTS // 4, 4))
    assert not asked


def test_more_variants_than_torch_compile_keeps_run_as_they_stand() -> None:
    double = doubling()
    with use_backend("inductor"), torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = torch.randn(LEAST_ELEMENTS // 4, 4).to(dtype)
            out = torch.empty_like(x)
            double(x, out, 2.0)
            assert torch.equal(out, x * 2)
