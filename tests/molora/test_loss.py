from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from molora import data, loss
from tests.conftest import make_rows


def make_problem(dtype: torch.dtype, n: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(29, 8, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(29, (n,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 4, 11, None])
def test_equals_cross_entropy(chunk: int | None) -> None:
    hidden, weight, targets = make_problem(torch.float64)
    ours = loss.frozen_head_cross_entropy(hidden, weight, targets, chunk=chunk)
    (gradient,) = torch.autograd.grad(ours * 0.3, hidden)
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact * 0.3, hidden)[0])


def test_softcap() -> None:
    hidden, weight, targets = make_problem(torch.float64)
    ours = loss.frozen_head_cross_entropy(hidden, weight, targets, softcap=0.7, chunk=4)
    (gradient,) = torch.autograd.grad(ours * 0.3, hidden)
    exact = F.cross_entropy(0.7 * torch.tanh(hidden @ weight.T / 0.7), targets, reduction="sum")
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact * 0.3, hidden)[0])


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_gradcheck(softcap: float | None) -> None:
    hidden, weight, targets = make_problem(torch.float64)
    assert torch.autograd.gradcheck(
        functools.partial(loss.frozen_head_cross_entropy, weight=weight, targets=targets, softcap=softcap, chunk=4),
        hidden,
    )


def test_bf16_error_is_within_twice_that_of_eager() -> None:
    hidden, weight, targets = make_problem(torch.bfloat16, n=64)
    wide, wide_weight = hidden.detach().double().requires_grad_(), weight.double()
    exact = torch.autograd.grad(F.cross_entropy(wide @ wide_weight.T, targets, reduction="sum"), wide)[0]
    eager = torch.autograd.grad(F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum"), hidden)[0]
    ours = torch.autograd.grad(loss.frozen_head_cross_entropy(hidden, weight, targets, chunk=10), hidden)[0]
    assert (ours.double() - exact).norm() <= 2 * (eager.double() - exact).norm()


def test_a_head_that_trains_is_refused() -> None:
    hidden, weight, targets = make_problem(torch.float32)
    with pytest.raises(ValueError, match="freeze"):
        loss.frozen_head_cross_entropy(hidden, weight.requires_grad_(), targets)


def test_no_positions_give_zero() -> None:
    hidden, weight, _ = make_problem(torch.float32, n=1)
    nothing = loss.frozen_head_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    assert nothing.item() == 0


def test_causal_lm_loss_is_the_models_own(tiny_config: LlamaConfig, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config).requires_grad_(False)
    examples = data.encode_rows(chat_tokenizer, [row | {"where": "-"} for row in make_rows(3)], 64)
    batch = data.Collate(chat_tokenizer)(examples.rows)
    total, count = loss.causal_lm_loss(model, batch)
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(total / count, own)
