"""Chosen before triton is first imported, which other test packages do by importing transformers: kernels run on the
GPU where there is one, else in Triton's interpreter. This file is read before every other conftest."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
