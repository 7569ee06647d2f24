"""What a patched model does in someone else's loop: router losses in its loss, exactly, and adapter-only saves."""
# ruff: noqa: F811 # fixtures are imported by name

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import molora
from molora import config, data, hooks, optim, routing
from molora.trainer import Trainer
from tests.conftest import write_jsonl
from tests.molora.test_routing import MOE, adapters, batch, formula, patched  # noqa: F401 # fixtures among them

IGNORED = -100


@pytest.fixture
def model(patched):
    model = copy.deepcopy(patched).train()
    model.molora.moe = MOE
    return model


def labels_of(ids, mask):
    return ids.masked_fill(mask == 0, IGNORED)


def lm_loss(model, ids, mask) -> torch.Tensor:
    """The language model's own loss, in a record that nobody combines."""
    with routing.using(model, routing.record(model, mask)):
        logits = model(ids, attention_mask=mask).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels_of(ids, mask)[:, 1:].flatten(), ignore_index=IGNORED)


def assert_same_gradient(model, expected, scale=1.0) -> None:
    largest = max(g.abs().max() for g in expected).item()
    for parameter, wanted in zip(adapters(model), expected, strict=True):
        # the gradient of the router losses travels in fp32
        torch.testing.assert_close(parameter.grad / scale, wanted, rtol=1e-5, atol=1e-6 * largest)


def checkpoint(model, kind: str) -> None:
    if kind != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()


@pytest.mark.parametrize("kind", ["none", "non_reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_is_that_of_loss_plus_formula_whatever_the_loop_multiplies_it_by(model, batch, kind):
    """Four micro-batches, each loss divided by four and multiplied by a gradient scaler's 1024."""
    ids, mask = batch
    expected, total = 0, 0.0
    for rows in torch.arange(4).chunk(4):
        expected = expected + lm_loss(model, ids[rows], mask[rows]) + formula(model, ids[rows], mask[rows])
    total, expected = expected.item(), torch.autograd.grad(expected, adapters(model))
    checkpoint(model, kind)
    seen = 0.0
    for rows in torch.arange(4).chunk(4):
        loss = model(ids[rows], attention_mask=mask[rows], labels=labels_of(ids[rows], mask[rows])).loss
        (loss / 4 * 1024).backward()
        seen += loss.item()
    assert seen == pytest.approx(total, rel=1e-6)
    assert_same_gradient(model, expected, scale=256)


@pytest.mark.parametrize("kind", ["none", "non_reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_forwards_may_come_before_one_backward(model, batch, kind):
    """A pair of answers, say: layers of the first are recomputed when the second forward was the last one made."""
    ids, mask = batch
    halves = [(ids[:2], mask[:2]), (ids[2:], mask[2:])]
    expected = sum(weight * (lm_loss(model, *h) + formula(model, *h)) for weight, h in zip((3, 1), halves, strict=True))
    expected = torch.autograd.grad(expected, adapters(model))
    checkpoint(model, kind)
    first, second = (model(i, attention_mask=m, labels=labels_of(i, m)).loss for i, m in halves)
    (3 * first + second).backward()
    assert_same_gradient(model, expected)


def test_a_loss_of_ones_own_adds_aux_loss_and_is_warned_where_it_forgets(model, batch):
    ids, mask = batch
    expected = torch.autograd.grad(lm_loss(model, ids, mask) + 2 * formula(model, ids, mask), adapters(model))
    plain = torch.autograd.grad(lm_loss(model, ids, mask), adapters(model))
    targets = labels_of(ids, mask)[:, 1:].flatten()

    def own_loss():
        out = model(ids, attention_mask=mask)
        return cross_entropy(out.logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED), out.aux_loss

    loss, aux_loss = own_loss()
    (loss + 2 * aux_loss).backward()
    assert_same_gradient(model, expected)
    model.zero_grad()
    with pytest.warns(UserWarning, match=r"leaves out outputs\.aux_loss"):
        own_loss()[0].backward()
    assert_same_gradient(model, plain)


def test_a_model_that_is_trained_in_eval_mode_is_told_so(model, batch):
    ids, mask = batch
    model.eval()  # as from_pretrained leaves it
    with pytest.warns(UserWarning, match=r"eval mode.* call model\.train\(\) first"):
        model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss.backward()


def test_evaluation_and_generation_are_without_router_losses(model, batch):
    ids, mask = batch
    expected = lm_loss(model, ids, mask).item()
    model.eval()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels_of(ids, mask))
        assert out.loss.item() == pytest.approx(expected, rel=1e-6)
        assert out.aux_loss.item() == pytest.approx(formula(model, ids, mask).item(), rel=1e-5)
        assert not hasattr(model(ids), "aux_loss")
    assert model.molora.ledger.current is None
    model.train()
    loss, logits = model(ids, attention_mask=mask, labels=labels_of(ids, mask), return_dict=False)[:2]
    assert loss.item() == pytest.approx(expected + formula(model, ids, mask).item(), rel=1e-6)
    assert logits.shape == (*ids.shape, 320)


def test_nothing_of_a_failed_step_is_left(model, batch):
    ids, mask = batch
    with pytest.raises(Exception, match=r".") as failure:
        model(ids, attention_mask=mask, labels=torch.full_like(ids, 10**6))
    assert failure.type in (IndexError, RuntimeError)
    assert model.molora.ledger.current is None
    handle = model.model.layers[0].register_full_backward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss.backward()
    handle.remove()
    model.zero_grad()
    stale = model.molora.ledger.current
    model.model(ids[:1])  # as measuring does, after a step that had not the memory
    assert stale is not None and model.molora.ledger.current is None
    expected = torch.autograd.grad(lm_loss(model, ids, mask) + formula(model, ids, mask), adapters(model))
    # what the failed backward left behind is not taken for a record of the loop's own
    model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss.backward()
    assert_same_gradient(model, expected)


def test_loss_free_bias_moves_after_each_backward(tiny_config, batch):
    ids, mask = batch
    model = LlamaForCausalLM(copy.deepcopy(tiny_config)).train()
    molora.inject(model, {"injection": {"lora_r": 2}, "moe": {"load_balance": {"type": "aux_loss_free"}}})
    routers = model.molora.routers
    loss = model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss
    assert not any(router.selection_bias.any() for router in routers)
    loss.backward()
    assert all(router.selection_bias.any() for router in routers)


@pytest.fixture
def like_rows(tmp_path) -> Path:
    """Rows of one length, so that weighing micro-batches by tokens, by labels or not at all is the same."""
    words = ["one", "two", "three", "four", "five", "six"]
    return write_jsonl(
        tmp_path / "like.jsonl", [{"text": " ".join(["what", *words[i:], *words[:i]])} for i in range(6)]
    )


@pytest.mark.parametrize("checkpointing", ["none", "reentrant"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_trainer_ends_where_moloras_own_ends(tiny_model_dir, like_rows, tmp_path, checkpointing):
    settings = config.load(
        None,
        [
            f"model_name={tiny_model_dir}", "device=cpu", "model.load_precision.mode=fp32",
            f"model.gradient_checkpointing={checkpointing}", "injection.lora_r=4", "injection.init_b_std=0.05",
            "moe.router_z_loss_coef=0.1", "moe.load_balance={aux_loss_coef: 1.0, scope: micro_batch}",
            "training.lr=1e-2", "training.max_train_steps=3", "training.batch_size=2", "training.grad_accum_steps=2",
            "training.save_steps=0",
        ],
    )  # fmt: skip
    own = Trainer(settings, tmp_path / "own", data.read_rows(str(like_rows)))
    batches = [batch for window in own.windows() for batch in window]
    assert len({(batch.tokens, batch.label_tokens) for batch in batches}) == 1
    start = copy.deepcopy(own.model)
    before = [parameter.detach().clone() for parameter in start.parameters()]
    own.train()

    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for batch in batches
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "theirs"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = transformers.Trainer(
        start, arguments, train_dataset=rows, optimizers=optim.build(start, settings.training)
    )
    trainer.train()
    trainer.save_model()
    for (name, theirs), ours, first in zip(start.named_parameters(), own.model.parameters(), before, strict=True):
        # Adam's first steps divide a gradient by its size, so rounding shows in single elements that hardly have one.
        assert (theirs - ours).norm() <= 1e-4 * (ours - first).norm(), name

    saved = {path.name for path in (tmp_path / "theirs").iterdir() if path.is_file()}
    assert {"adapter.safetensors", "molora.json"} <= saved and "model.safetensors" not in saved
    again, _ = molora.load(tmp_path / "theirs", device="cpu", precision="fp32")
    ids = rows[0]["input_ids"][None]
    assert torch.equal(again(ids).logits, start.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_trl_adds_the_router_losses_and_logs_them(model, chat_tokenizer, tmp_path):
    """TRL's own loss over a fused head knows nothing of outputs.loss: it takes outputs.aux_loss, as from a mixture."""
    trl = pytest.importorskip("trl")
    rows = pytest.importorskip("datasets").Dataset.from_list(
        [{"text": text} for text in ("one two three", "four five")]
    )
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=True),
        train_dataset=rows,
        processing_class=chat_tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    routers = formula(model, ids, mask)
    expected = torch.autograd.grad(lm_loss(model, ids, mask) + routers, adapters(model))
    trainer.compute_loss(model, inputs).backward()
    assert trainer._metrics["train"]["aux_loss"] == [pytest.approx(routers.item(), rel=1e-5)]
    assert_same_gradient(model, expected)


@pytest.mark.filterwarnings("ignore")
def test_a_loop_of_accelerate_saves_the_adapter_only(tiny_model_dir, batch, tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    ids, mask = batch
    model = molora.inject(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), {"lora_r": 4})
    accelerator = accelerate.Accelerator()
    optimizer = torch.optim.SGD(adapters(model), lr=0.1)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    accelerator.backward(model(input_ids=ids, attention_mask=mask, labels=labels_of(ids, mask)).loss)
    optimizer.step()

    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(tmp_path / "out", state_dict=accelerator.get_state_dict(model))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter.safetensors", "molora.json"}
    again, _ = molora.load(tmp_path / "out", device="cpu", precision="fp32")
    assert torch.equal(again(ids).logits, unwrapped.eval()(ids).logits)


def test_save_pretrained_writes_the_adapter_and_is_the_models_own_again_after_remove(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = [p.clone() for p in model.parameters()]
    molora.inject(model, {"lora_r": 4, "init_b_std": 0.1})
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapters(copied):
            parameter.add_(1.0)
    gathered = {name: tensor + 1.0 for name, tensor in model.state_dict().items()}
    copied.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    with pytest.raises(ValueError, match="state_dict lacks tensors"):
        model.save_pretrained(tmp_path / "none", state_dict={f"module.{name}": x for name, x in gathered.items()})
    model.save_pretrained(tmp_path / "not_mine", is_main_process=False)
    assert not (tmp_path / "not_mine").exists()
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"adapter.safetensors", "molora.json"}
    read = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("copy", "gathered")]
    assert read[0] == read[1]
    with pytest.raises(molora.UserError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)

    molora.remove(copied).save_pretrained(tmp_path / "base")
    molora.remove(model).save_pretrained(tmp_path / "base2")
    assert "output_router_logits" not in (tmp_path / "base" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), before, strict=True))
    ids = torch.ones(1, 3, dtype=torch.long)
    assert not hasattr(copied(ids, labels=ids), "aux_loss")


def test_the_config_that_trl_reads_says_that_there_are_routers():
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1))
    molora.inject(model, {"lora_r": 2, "strategy": "dense_lora"})
    assert not hasattr(model.config, "output_router_logits")
    molora.remove(model)
    molora.inject(model, {"lora_r": 2})
    assert model.config.output_router_logits is True and model.config.router_aux_loss_coef == 1.0


def test_the_head_of_trl_is_not_asked_for_logits_of_routers():
    """It reads the configuration where nobody says no (DPO without the router losses, and a reference model)."""
    model = molora.inject(
        LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1)).eval(), {"lora_r": 2}
    )
    given = {"input_ids": torch.ones(1, 3, dtype=torch.long), "fused_lm_head": True}
    assert hooks._begin(model, (), given)[1]["output_router_logits"] is False
