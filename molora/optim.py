"""AdamW over the fp32 adapters and the learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from molora.config import Training
from molora.patch import parameter_groups


def build(model: nn.Module, training: Training) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Optimizer over every adapter parameter, those of later phases too, and the schedule over ``max_train_steps``.

    One optimizer lasts the whole run: AdamW passes over a parameter without gradient, so one that opens in a later
    phase gets its moments and its own step count then. Weight decay is on matrices only. Step counts of ``training``
    are optimizer steps.
    """
    parameters = [parameter for members in parameter_groups(model).values() for _, parameter in members]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.lr, fused=parameters[0].is_cuda
    )
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
