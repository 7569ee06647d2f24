"""What is computed element by element, or row by row, between matrix products: the ``inductor`` backend's own part.

PyTorch makes a pass over memory for each operation. A function marked with :func:`one_pass` is written as PyTorch all
the same; where the backend is ``inductor``, ``torch.compile`` makes one C++ loop of it at its first call, in a second
or two, and keeps that on disk (TORCHINDUCTOR_CACHE_DIR). Elsewhere it runs as it stands, on some rows at a time, so
that what it makes in between stays in a core's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from molora_kernels import backend

LEAST_ELEMENTS = 1 << 18
"""Of a matrix from which a compiled pass is run: on a smaller one, the call itself costs more than the passes that it
spares (docs/log.md)."""

_ELEMENTS = 64 * 2816
"""Of a matrix, at a time, where a pass is not compiled: what it reads and writes stays in a core's cache."""


def compiled(rows: Tensor) -> bool:
    """Whether a pass over these rows is compiled under the present choice of backend."""
    if rows.numel() < LEAST_ELEMENTS:
        return False
    if torch.is_inference_mode_enabled():  # whose tensors would want loops of their own
        return False
    if torch.jit.is_tracing() or is_fx_symbolic_tracing():  # torch.compile refuses to be traced
        return False
    return backend.backend_for(rows.device) == "inductor"


def one_pass(rows: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a function that fills tensors which it is given. Its first ``rows`` arguments are tensors of one length:
    what it writes to a row of them depends on no other row."""

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        compile_ = functools.cache(lambda: torch.compile(function, fullgraph=True, dynamic=True))
        refused: set[torch.dtype] = set()

        @functools.wraps(function)
        def run(*args: Any) -> None:
            if args[0].dtype not in refused and compiled(args[0]):
                from torch._dynamo import exc  # takes a second, so not before something is compiled

                try:
                    with torch.no_grad():
                        # Without their history: of a view, or of what requires grad, it would make another loop.
                        return compile_()(*(a.data if isinstance(a, Tensor) else a for a in args))
                except exc.FailOnRecompileLimitHit:
                    refused.add(args[0].dtype)  # more dtypes and layouts than torch.compile keeps of one function
                except exc.BackendCompilerFailed as error:
                    backend.without_compiler(error)  # nothing was written yet
            if args[0].device.type != "cpu":
                return function(*args)
            step = max(1, _ELEMENTS * len(args[0]) // max(1, args[0].numel()))
            for part in zip(*(t.split(step) for t in args[:rows]), strict=True):
                function(*part, *args[rows:])
            return None

        return run

    return mark
