"""An operator's autograd node without PyTorch's dispatcher, where nobody listens there.

``torch.library`` operators are what ``torch.compile``, ``opcheck``, fake tensors and dispatch modes see. A plain eager
call needs none of it, and on a fast GPU the host's time for it is what a step waits for: an operator with twenty
tensors in lists is taken apart and put together four times on its way through (docs/log.md has what that costs). So a
plain call goes to the same body, with the same formula for backward, straight from one ``autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

Nested = Any
"""Arguments, results or gradients of an operator, in order: tensors, None, numbers, and lists of tensors."""


@dataclass(frozen=True)
class Operator:
    """A forward in both ways. Arguments begin with the tensor that says where it runs."""

    registered: Callable[..., Any]
    """What ``torch.library.custom_op`` made of ``body``."""
    body: Callable[..., Any]
    setup_context: Callable[..., None]
    backward: Callable[..., Nested]

    def __call__(self, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:  # torch.library knows no formula for it, and gives zeros
            raise NotImplementedError(
                "molora's operators have no forward-mode derivative (torch.func.jvp, jacfwd, hessian; dual numbers): "
                "take molora_kernels.use_backend('reference')"
            )
        if not is_plain(arguments[0]):
            return self.registered(*arguments)
        flat, lengths = _flatten(arguments)
        if not (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in flat)):
            return self.body(*arguments)
        given: list[list[int | None] | None] = []  # how the results were nested, which apply gives back flat
        results = _Node.apply(self, lengths, given, *flat)
        return results[0] if given[0] is None else tuple(_nest(results, given[0]))


def is_plain(x: Tensor) -> bool:
    """Whether a call with x is only to be computed: not compiled, traced, transformed, counted or intercepted."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] # of no arguments, as PyTorch types it
        ctx: Any, operator: Operator, lengths: list[int | None], given: list[list[int | None] | None], *flat: Any
    ) -> tuple[Any, ...]:
        arguments = _nest(flat, lengths)
        results = operator.body(*arguments)
        operator.setup_context(ctx, arguments, results)
        alone = isinstance(results, Tensor)
        made, ctx.results = _flatten([results] if alone else results)
        given.append(None if alone else ctx.results)
        ctx.operator, ctx.lengths = operator, lengths
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] # as above
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = _nest(needs[3:], ctx.lengths)
        try:
            found = ctx.operator.backward(ctx, *_nest(grads, ctx.results))
        finally:
            ctx.needs_input_grad = needs
        return (None, None, None, *_flatten(found)[0])


def _flatten(nested: Nested) -> tuple[list[Any], list[int | None]]:
    """All in one row, and how many each had, None where it was no list."""
    flat: list[Any] = []
    lengths: list[int | None] = []
    for one in nested:
        if isinstance(one, list):
            flat += one
            lengths.append(len(one))
        else:
            flat.append(one)
            lengths.append(None)
    return flat, lengths


def _nest(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    nested: list[Any] = []
    start = 0
    for length in lengths:
        if length is None:
            nested.append(flat[start])
            start += 1
        else:
            nested.append(list(flat[start : start + length]))
            start += length
    return nested
