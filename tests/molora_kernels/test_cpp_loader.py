"""C++ kernels: what is done where they do not compile, and no read or write beyond what they were given."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molora_kernels import backend, cpp, use_backend

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FILES = "grouped_lora/test_cpp.py", "mlp_block/test_swiglu.py", "router/test_router.py", "few_tokens/test_few_tokens.py"
TESTS = [str(HERE / file) for file in FILES]


def fails() -> cpp.Functions:
    raise OSError("cannot compile this")


def test_where_compiling_fails_auto_is_torch_from_then_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "_compiles", True)  # and put back
    monkeypatch.setattr(backend, "compiler_installed", lambda: True)
    here = torch.device("cpu")
    with use_backend("inductor"), pytest.raises(OSError, match="cannot compile this"):
        cpp.compiled(here, fails)
    with use_backend("auto"):
        assert backend.compiles("cpu") and not backend.compiles("cuda")
        assert not cpp.compiled(here, fails) and not cpp.compiled(here, fails)
        assert backend.backend_for(here) == "torch" and not backend.compiles("cpu")
    assert caplog.text.count("compiling failed, so from here on it is 'torch' on cpu: cannot compile this") == 1


X86 = platform.machine() in ("x86_64", "AMD64")
OTHERS = [
    *(f"clang++ -march={march}" for march in ("x86-64", "x86-64-v3", "x86-64-v4 -mavx512bf16", "native")),
    "aarch64-linux-gnu-g++",
]
"""Compilers and processors, where they are there, beside g++ and this one, which the sanitizers' test has."""


def builds(compiler: str, *flags: str, source: str = "", folder: Path) -> subprocess.CompletedProcess[str]:
    command = [compiler, *flags, "-std=c++20", "-fopenmp", "-shared", "-fPIC", "-x", "c++", source or "-"]
    return subprocess.run(
        [*command, "-o", str(folder / "kernels.so")], input="", capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
def test_kernels_compile_for_every_processor(command: str, tmp_path: Path) -> None:
    compiler, *flags = command.split()
    if not shutil.which(compiler) or builds(compiler, *flags, folder=tmp_path).returncode:
        pytest.skip(f"no {command} here")
    for source in (ROOT / "molora_kernels").glob("*/*.cpp"):
        warnings = ("-Wall", "-Wextra", "-Wno-psabi", "-Werror")
        ran = builds(compiler, *flags, "-O2", *warnings, source=str(source), folder=tmp_path)
        assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.slow
def test_kernels_are_right_under_clang(tmp_path: Path) -> None:
    """Where there is no g++, as on macOS, it is what compiles them."""
    if not shutil.which("clang++") or builds("clang++", folder=tmp_path).returncode:
        pytest.skip("no clang++ with OpenMP here")
    environment = os.environ | {"CXX": "clang++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", *TESTS]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="sanitizers are looked for where g++ has them")
@pytest.mark.parametrize("more", ["", "-march=x86-64-v3", "-march=x86-64"])
def test_kernels_stay_within_what_they_are_given(more: str) -> None:
    """And are right, in vectors of the machine's own width and of less, bf16 multiplied in pairs and in fp32."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no sanitizers here")
    environment = os.environ | {"LD_PRELOAD": " ".join(libraries), "PYTHONMALLOC": "malloc"}
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1", "PYTHONPATH": str(HERE)}
    if more and not X86:
        pytest.skip("no such flag on this processor")
    environment |= {"MORE_FLAGS": more, "CXX": "g++"}
    command = [sys.executable, "-m", "pytest", "-p", "sanitized", "-k", "not torch.compile", *TESTS]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
