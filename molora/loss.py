"""Cross-entropy over a large frozen vocabulary, without ever holding all logits.

The logits of 8 x 1024 tokens over 128,256 words are 4.2 GB in fp32, the largest tensor of a training step. Only
positions that have a label are computed, a chunk at a time, and since the head is frozen the gradient of the hidden
states is finished in the same pass, so that backward recomputes nothing.

Shape letters: B rows, T tokens, N positions with a label, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast

from molora.data import Batch
from molora.errors import UserError

CHUNK_ELEMENTS = 2**26
"""Logits held at a time: 256 MB in fp32."""
_CAUSAL = "molora_causal_sdpa"


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, chunk: int) -> Tensor:
        keep_gradient = ctx.needs_input_grad[0]
        d_hidden = torch.empty_like(hidden) if keep_gradient else None
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        slope: Tensor | None = None  # of the softcap
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.T).to(exact)
            if softcap is not None:
                logits.div_(softcap).tanh_()
                slope = 1 - logits.square() if keep_gradient else None
                logits.mul_(softcap)
            target = targets[part, None]
            log_normaliser = logits.logsumexp(dim=1, keepdim=True)
            total += (log_normaliser - logits.gather(1, target)).sum()
            if d_hidden is not None:
                d_logits = logits.sub_(log_normaliser).exp_()
                d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, -1.0))
                if slope is not None:
                    d_logits.mul_(slope)
                d_hidden[part] = d_logits.to(weight.dtype) @ weight
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None, None, None]:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), None, None, None, None


def frozen_head_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None = None, chunk: int | None = None
) -> Tensor:
    """``F.cross_entropy(hidden @ weight.T, targets, reduction="sum")`` in chunks of ``chunk`` positions.

    ``hidden`` (N, H) and ``weight`` (V, H) share a floating dtype, ``targets`` is (N,) int64; the softmax is fp32 or
    better and so is the scalar returned. ``softcap`` c makes c tanh(x / c) of a logit x (Gemma 2's technical report,
    section 2). Raises ValueError if ``weight`` needs a gradient: this function has none for it.
    """
    if weight.requires_grad:
        raise ValueError("the output head needs a gradient, which this loss does not compute: freeze it")
    chunk = chunk or max(1, CHUNK_ELEMENTS // len(weight))
    loss = _FrozenHeadCrossEntropy.apply(hidden, weight, targets, softcap, chunk)
    assert isinstance(loss, Tensor)
    return loss


def causal_lm_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
    """Sum of next-token losses of a batch on the model's device, and the number N of tokens summed.

    Runs the decoder without its head. The sum is a fp32 scalar with a graph to whatever trains in the decoder. No mask
    is needed for padding, which lies at the right, where no token looks; packed rows are kept apart, as their position
    ids, which start again, say.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"the output head is {head}; this loss knows linear heads without bias only")
    with _attention(model, batch.position_ids) as mask:
        hidden: Tensor = model.base_model(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
    predicting = hidden.flatten(0, 1).index_select(0, batch.predictors)
    targets = batch.labels.flatten().index_select(0, batch.predictors + 1)
    weight = head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight
    factor, softcap = after_head(model)
    predicting = predicting if factor == 1 else predicting * factor
    return frozen_head_cross_entropy(predicting, weight, targets, softcap=softcap), batch.label_tokens


def after_head(model: PreTrainedModel) -> tuple[float, float | None]:
    """What ``model`` makes of its head's logits: a factor (Cohere, Falcon-H1, Granite), then a softcap (Gemma 2) if
    not None."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier"))
    factor = math.prod(value for value in named if value) / (getattr(config, "logits_scaling", None) or 1)
    return factor, getattr(config, "final_logit_softcapping", None)


class _Output(BaseModelOutputWithPast):
    """A decoder's output of which only the hidden states are there, and what else a model asks it for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises :class:`UserError` where ``model`` makes other logits of hidden states than this loss does.

    Its own forward is asked, with random hidden states in place of the decoder, so it costs the same for all sizes.
    """
    head: Any = model.get_output_embeddings()
    draw, config = torch.Generator().manual_seed(0), model.config.get_text_config()
    hidden = torch.randn(1, 4, config.hidden_size, generator=draw).to(model.device, head.weight.dtype)
    ids = torch.zeros(1, 4, dtype=torch.int64, device=model.device)
    with mock.patch.object(model.base_model, "forward", lambda *_, **__: _Output(last_hidden_state=hidden)):
        theirs = model(input_ids=ids, use_cache=False).logits
    factor, softcap = after_head(model)
    ours = head(hidden * factor)
    ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
    rounding = torch.finfo(hidden.dtype).eps ** 0.5 * theirs.abs().max()
    if theirs.shape != ours.shape or not (ours.float() - theirs.float()).abs().max() <= rounding:
        raise UserError(
            f"{config.model_type} models make their logits in a way that this loss does not know: it knows a linear "
            "head, a factor (logit_scale; 1 / logits_scaling; lm_head_multiplier) and final_logit_softcapping"
        )


@contextmanager
def _attention(model: PreTrainedModel, position_ids: Tensor | None) -> Iterator[Tensor | None]:
    """The mask that the decoder is to be given, in a context in which it makes none of its own.

    To find out whether rows are packed, transformers reads a value of the position ids, for which the host waits until
    the device has come so far. We know it. Only plain causal attention by SDPA is done so; windows and the other
    implementations are left to transformers.
    """
    config = model.config.get_text_config()  # the config itself, where a model does nothing but text
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        yield None
    elif position_ids is not None:
        starts = torch.cat([torch.zeros_like(position_ids[:, :1]), position_ids.diff() != 1], dim=1)
        row = starts.cumsum(1)
        yield (row[:, None, :, None] == row[:, None, None, :]).tril()
    else:
        # transformers makes no mask for an implementation that it has no mask for; without one, SDPA is causal. Layers
        # that are recomputed later find "sdpa" again and are given the same None.
        AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
        config._attn_implementation = _CAUSAL
        try:
            yield None
        finally:
            config._attn_implementation = "sdpa"
