"""molora as a PEFT method: the same layers, so the same numbers, through PEFT's own ways to add, switch and save."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import molora

peft = pytest.importorskip("peft")
from molora.peft import MoloraConfig, MoloraLayer  # noqa: E402

IDS = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(8))
INJECTION = {"lora_r": 4, "init_b_std": 0.1}


@pytest.fixture
def base(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def logits(model) -> torch.Tensor:
    training = model.training
    with torch.no_grad():
        out = model.eval()(input_ids=IDS).logits
    model.train(training)
    return out


def train(model, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "injection", [{}, {"target_keywords": ["gate_proj", "o_proj"]}, {"strategy": "dense_lora"}], ids=str
)
def test_it_trains_exactly_as_the_patched_model_does(base, injection):
    settings = {"injection": INJECTION | injection, "moe": {"load_balance": {"aux_loss_coef": 0.5}}}
    patched = copy.deepcopy(base)
    torch.manual_seed(0)
    molora.inject(patched, settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, MoloraConfig(**settings))
    assert torch.equal(logits(model), logits(patched))
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".base." in n} == set()

    train(patched)
    train(model)
    assert torch.equal(logits(model), logits(patched))
    aux = [m(input_ids=IDS, labels=IDS) for m in (model, patched)]
    assert getattr(aux[0], "aux_loss", None) == getattr(aux[1], "aux_loss", None)


def test_saved_and_loaded_with_the_tensors_of_moloras_own_file(base, tiny_model_dir, tmp_path):
    model = peft.get_peft_model(base, MoloraConfig(injection=INJECTION))
    train(model)
    model.save_pretrained(tmp_path / "peft")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    patched = molora.inject(AutoModelForCausalLM.from_pretrained(tiny_model_dir), INJECTION)
    names = {f"base_model.model.{name}" for name in patched.state_dict() if "lora_" in name or ".router." in name}
    assert set(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == names

    again = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = peft.PeftModel.from_pretrained(again, tmp_path / "peft")
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32)
    assert torch.equal(logits(auto), logits(model))

    torn = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    torn.popitem()
    with pytest.raises(molora.UserError, match="does not fit"):
        peft.set_peft_model_state_dict(again, torn)


def test_molora_load_names_the_way_to_open_what_peft_saved(base, chat_tokenizer, tmp_path):
    peft.get_peft_model(base, MoloraConfig(injection=INJECTION)).save_pretrained(tmp_path)
    said = r"adapter that PEFT saved.*PeftModel\.from_pretrained.*AutoPeftModelForCausalLM.*import molora\.peft"
    with pytest.raises(molora.UserError, match=said):
        molora.load(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)  # transformers opens adapters of PEFT, but not this one
    with pytest.raises(molora.UserError, match=said):
        molora.load(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("MOLORA", "NOT_IMPORTED"))  # as it is before the import
    with pytest.raises(molora.UserError, match=said):
        molora.load(tmp_path)


def test_the_model_card_says_what_to_import(base, tmp_path):
    model = peft.get_peft_model(base, MoloraConfig(injection=INJECTION))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "one")
    model.add_adapter("named", MoloraConfig(injection=INJECTION))
    model.save_pretrained(tmp_path / "several", selected_adapters=["named"])
    for folder in ("one", "several"):
        card = (tmp_path / folder / "README.md").read_text()
        assert card.count("import molora.peft") == 1 and "library_name: peft" in card

    (tmp_path / "README.md").write_text("# Somebody's own\n")
    model.peft_config["named"].save_pretrained(str(tmp_path / "config"))
    assert (tmp_path / "README.md").read_text() == "# Somebody's own\n"


def test_several_adapters_switch_and_leave_one_another_alone(base, tmp_path):
    plain = logits(base)
    model = peft.get_peft_model(base, MoloraConfig(injection=INJECTION), adapter_name="one")
    train(model)
    one = logits(model)
    model.add_adapter("two", MoloraConfig(injection={**INJECTION, "lora_r": 2, "target_keywords": ["gate_proj"]}))
    assert torch.equal(logits(model), one)
    model.set_adapter("two")
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert len(base.molora.ledger.names) == 2 and not torch.equal(logits(model), one)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".two." in name for name in trainable)
    train(model)
    two = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        assert model(input_ids=IDS, labels=IDS).aux_loss == 0
    assert torch.equal(logits(model), two)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    fresh = peft.PeftModel.from_pretrained(model.unload(), tmp_path / "two", adapter_name="again")
    assert torch.equal(logits(fresh), two)
    with pytest.raises(molora.UserError, match="one molora adapter"):
        fresh.base_model.set_adapter(["again", "again"])


def test_an_adapter_that_cannot_be_added_leaves_the_active_one_as_it_was(base):
    model = peft.get_peft_model(base, MoloraConfig(injection=INJECTION))
    aux_loss = model(input_ids=IDS, labels=IDS).aux_loss
    with pytest.raises(molora.UserError, match="no_proj"):
        model.add_adapter("two", MoloraConfig(injection={"target_keywords": ["no_proj"]}))
    assert torch.equal(model(input_ids=IDS, labels=IDS).aux_loss, aux_loss)


def test_deleting_and_unloading_bring_the_base_back(base):
    plain, kinds = logits(base), {name: type(module) for name, module in base.named_modules()}
    model = peft.get_peft_model(base, MoloraConfig(injection=INJECTION), adapter_name="one")
    one = logits(model)
    model.add_adapter("two", MoloraConfig(injection=INJECTION))
    model.set_adapter("two")
    model.delete_adapter("two")
    assert torch.equal(logits(model), one)
    with pytest.raises(molora.UserError, match="convert merge"):
        model.merge_and_unload()
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain)
    assert {name: type(module) for name, module in unloaded.named_modules()} == kinds
    assert not any(isinstance(module, MoloraLayer) for module in unloaded.modules())


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(molora.UserError, match="num_expert"):
        MoloraConfig(injection={"num_expert": 4})
    with pytest.raises(molora.UserError, match="top_k"):
        MoloraConfig(injection={"top_k": 5, "num_experts": 4})


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer_resumes_it(base, tiny_model_dir, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(4, 1)]

    def run(steps: int, folder: str, resume: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        model = peft.get_peft_model(model, MoloraConfig(injection=INJECTION))
        arguments = TrainingArguments(
            str(tmp_path / folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=steps, save_steps=2,
            per_device_train_batch_size=2, gradient_checkpointing=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return peft.get_peft_model_state_dict(model)

    whole = run(4, "whole", resume=False)
    run(2, "parts", resume=False)
    parts = run(4, "parts", resume=True)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.filterwarnings("ignore")
def test_trl_makes_it_of_an_unpatched_model_and_saves_the_adapter_only(base, tiny_model_dir, chat_tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    rows = pytest.importorskip("datasets").Dataset.from_list([{"text": "one two three"}, {"text": "four five"}])
    arguments = trl.SFTConfig(
        str(tmp_path / "sft"), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=2,
        learning_rate=1e-2, gradient_checkpointing=True, logging_steps=1,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        base, arguments, train_dataset=rows, processing_class=chat_tokenizer,
        peft_config=MoloraConfig(injection=INJECTION),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(log["aux_loss"] > 0 for log in trainer.state.log_history if "loss" in log)

    for folder in (tmp_path / "sft", tmp_path / "sft" / "checkpoint-2"):
        saved = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
        assert not saved & {"model.safetensors", "config.json"}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "sft")
    assert torch.equal(logits(model), logits(trainer.model))
