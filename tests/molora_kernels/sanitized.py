"""A pytest plugin of ``test_cpp_loader.py``: C++ kernels are compiled with g++'s sanitizers."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch._inductor.codecache import CppCodeCache

FLAGS = ["-O1", "-g", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC", "-fsanitize=address,undefined"]


def load(source: str, extra_flags: Sequence[str]) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    (folder / "kernels.cpp").write_text(source, encoding="utf-8")
    more = shlex.split(os.environ.get("MORE_FLAGS", ""))
    subprocess.check_call(
        ["g++", *FLAGS, *more, *extra_flags, str(folder / "kernels.cpp"), "-o", str(folder / "kernels.so")]
    )
    return ctypes.CDLL(str(folder / "kernels.so"))


CppCodeCache.load = staticmethod(load)  # type: ignore[assignment] # for this process
