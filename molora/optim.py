"""AdamW over the fp32 adapters, the learning-rate schedule, and the update that passes over what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from molora.config import Training
from molora.distributed import local
from molora.patch import parameter_groups


def build(model: nn.Module, training: Training) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Optimizer over every adapter parameter, those of later phases too, and the schedule over ``max_train_steps``.

    One optimizer lasts the whole run: AdamW passes over a parameter without gradient, so one that opens in a later
    phase gets its moments and its own step count then. Weight decay is on matrices only. Step counts of ``training``
    are optimizer steps. The optimizer is the fused one on every device: it alone can pass over a step on the device's
    own word (:func:`update`).
    """
    parameters = [parameter for members in parameter_groups(model).values() for _, parameter in members]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Imported here: it brings peft and bitsandbytes along where they are installed, which commands need not wait for.
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=training.lr, fused=True)
    # transformers' plain "constant" takes warm-up steps and then makes none.
    name = "constant_with_warmup" if training.lr_scheduler == "constant" else training.lr_scheduler
    schedule = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=training.max_train_steps,
    )
    assert isinstance(schedule, LambdaLR)
    return optimizer, schedule


class Update(NamedTuple):
    """What an update saw, on the device."""

    grad_norm: Tensor
    """() fp32, 2-norm of the whole gradient before clipping."""
    tensor_norms: Tensor
    """(P,) fp32, the same of each parameter; 0 where a parameter has no gradient."""
    skipped: Tensor
    """() bool: the loss or the gradient was not finite, so nothing was changed."""


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    loss: Tensor,
    max_grad_norm: float,
    add: Callable[[Tensor], Tensor] | None = None,
) -> Update:
    """Clip the gradient of ``parameters`` and step, unless ``loss`` or the gradient is not finite.

    The device decides and the host does not wait for it: a skipped step leaves weights, moments and step counts as
    they were. ``max_grad_norm = 0`` does not clip. Gradients stay, for whoever looks at them. Of
    parameters that are spread over processes each has a part; ``add`` adds a tensor over all of them.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    found = iter(torch._foreach_norm(gradients) if gradients else ())
    tensor_norms = torch.stack([loss.new_zeros(()) if p.grad is None else next(found) for p in parameters])
    if add is not None:
        tensor_norms = add(tensor_norms.square()).sqrt()
    grad_norm = torch.linalg.vector_norm(tensor_norms)
    skipped = ~(grad_norm.isfinite() & loss.isfinite())
    if max_grad_norm > 0:
        torch._foreach_mul_(gradients, (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined] # how torch.amp.GradScaler tells AdamW, too
    optimizer.step()
    return Update(grad_norm, tensor_norms, skipped)
