"""Kernels for routed mixtures of LoRA experts. Depends on torch, and on Triton where there is a GPU for it."""

from molora_kernels.backend import backend_for, decided_by, use_backend
from molora_kernels.dropout import dropout_mask, new_dropout_seed
from molora_kernels.few_tokens.api import few_tokens
from molora_kernels.grouped_lora.api import grouped_lora
from molora_kernels.grouped_lora.dispatch import use_form
from molora_kernels.mlp_block.api import MlpOutput, Projection, Router, mlp_block
from molora_kernels.router.api import Routing, router

__all__ = [
    "MlpOutput",
    "Projection",
    "Router",
    "Routing",
    "backend_for",
    "decided_by",
    "dropout_mask",
    "few_tokens",
    "grouped_lora",
    "mlp_block",
    "new_dropout_seed",
    "router",
    "use_backend",
    "use_form",
]
