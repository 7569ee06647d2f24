from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import molora
from molora import MoE, chat, config, data, packing, routing
from molora.errors import UserError
from molora.loss import causal_lm_loss
from tests.conftest import make_rows

KINDS = {
    "llama-sdpa": ("llama", {"attn_implementation": "sdpa"}),
    "llama-eager": ("llama", {"attn_implementation": "eager"}),
    "mistral-window": ("mistral", {"attn_implementation": "sdpa", "sliding_window": 6}),
    "qwen2-sdpa": ("qwen2", {"attn_implementation": "sdpa"}),
}


@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_every_row_is_in_one_pack_and_fits(lengths: list[int]) -> None:
    packs = packing.best_fit_decreasing(lengths, 20)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(0 < total <= 20 for total in sums)
    # Best fit never opens a pack while another has room: of any two, one could not have taken the other's rows.
    assert all(one + other > 20 for i, one in enumerate(sums) for other in sums[:i])


def test_the_best_fit_is_taken() -> None:
    assert packing.best_fit_decreasing([6, 5, 3, 4, 2], 10) == [[0, 3], [1, 2, 4]]
    assert packing.best_fit_decreasing([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
    with pytest.raises(ValueError, match="length 11"):
        packing.best_fit_decreasing([11], 10)


@pytest.fixture
def rows(chat_tokenizer: PreTrainedTokenizerFast) -> data.Examples:
    made = [*make_rows(9), {"text": "one two three"}, {"text": "it is"}]
    return data.encode_rows(chat_tokenizer, [row | {"where": f"x:{i}"} for i, row in enumerate(made)], 96)


def model_of(kind: str) -> PreTrainedModel:
    name, settings = KINDS[kind]
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape, **settings))
    injection = {"num_experts": 4, "top_k": 2, "lora_r": 2, "init_b_std": 0.1}
    return molora.inject(model, injection).train()


def only(example: data.Example, row: int) -> data.Example:
    """The pack with the labels of one of its rows."""
    start = sum(example.lengths[:row])
    labels = torch.full_like(example.labels, chat.IGNORE)
    part = slice(start, start + example.lengths[row])
    labels[part] = example.labels[part]
    return replace(example, labels=labels)


def transformers_loss(model: PreTrainedModel, batch: data.Batch) -> float:
    """The sum of the losses from the model's own forward, with whatever mask it makes."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    ).item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_has_the_loss_that_it_has_alone(
    kind: str, rows: data.Examples, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Several packs in a batch, of different lengths, so that some are padded. The tolerance is rounding of fp32."""
    model, collate = model_of(kind), data.Collate(chat_tokenizer)
    packed = packing.pack(rows, 96).rows
    assert len({len(pack.input_ids) for pack in packed}) > 1
    assert max(len(pack.lengths) for pack in packed) > 2
    alone = {row.where: transformers_loss(model, collate([row])) for row in rows.rows}
    for row in rows.rows:
        assert causal_lm_loss(model, collate([row]))[0].item() == pytest.approx(alone[row.where], rel=1e-4)
    for i, pack in enumerate(packed):
        for row, where in enumerate(pack.where.split(", ")):
            batch = collate([only(pack, row) if j == i else only(other, 0) for j, other in enumerate(packed)])
            others = sum(alone[other.where.split(", ")[0]] for j, other in enumerate(packed) if j != i)
            loss, _ = causal_lm_loss(model, batch)
            assert loss.item() - others == pytest.approx(alone[where], rel=1e-4), where


def step(model: PreTrainedModel, batches: list[data.Batch]) -> tuple[routing.RouterLosses, dict[str, Tensor]]:
    model.zero_grad()
    moe = MoE.model_validate({"router_z_loss_coef": 0.3, "load_balance": {"aux_loss_coef": 0.5}})
    records, losses = [], []
    for batch in batches:
        records.append(routing.record(model, batch.attention_mask))
        with routing.using(model, records[-1]):
            losses.append(causal_lm_loss(model, batch)[0])
    combined = routing.combine(model, records, moe)
    for record, loss in zip(records, losses, strict=True):
        with routing.using(model, record):
            loss.backward()
    groups = molora.parameter_groups(model).values()
    return combined, {name: p.grad.clone() for members in groups for name, p in members if p.grad is not None}


def test_gradients_and_router_losses_are_those_of_the_rows_alone(
    rows: data.Examples, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, collate = model_of("llama-sdpa"), data.Collate(chat_tokenizer)
    one, expected = step(model, [collate([row]) for row in rows.rows])
    packed = packing.pack(rows, 96)
    other, found = step(model, [collate(packed.rows)])
    for name in ("z_loss", "load_balance", "load"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-3, atol=1e-5)


def test_collate_numbers_packed_rows_and_padding_from_zero(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    made = [data.Example(torch.arange(5, 5 + n), torch.arange(5, 5 + n), "d", f"x:{n}") for n in (3, 2, 4)]
    packed = packing.pack(data.Examples(made, 0, 0), 5)
    assert [pack.where for pack in packed.rows] == ["x:4", "x:3, x:2"]
    batch = data.Collate(chat_tokenizer)(packed.rows)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 6, 7, 8, -100], [-100, 6, 7, -100, 6]]
    assert batch.predictors.tolist() == [0, 1, 2, 5, 6, 8]
    assert (batch.tokens, batch.label_tokens) == (9, 6)
    assert batch.to("cpu").position_ids is not None


def test_flash_attention_is_refused() -> None:
    with pytest.raises(UserError, match="use sdpa, or packing: false"):
        config.load(None, ["data.packing=true", "model.attn_implementation=flash_attention_2"])
