"""Adapters over the hub and back, both kinds, by the real clients: a hub of their own on this machine, see
:mod:`tests.fake_hub`."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

import molora
from molora import adapter, config, convert, evaluate
from tests.fake_hub import Hub

IDS = torch.arange(12).view(2, 6)
SHAPE = {"lora_r": 4, "init_b_std": 0.1}
LOADED = {"device": "cpu", "precision": "fp32"}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def pushed(hub: Hub, tiny_model_dir: Path, chat_tokenizer) -> torch.Tensor:
    """Logits of the adapter me/experts."""
    model = molora.inject(molora.load(tiny_model_dir, **LOADED)[0], SHAPE)
    model.push_to_hub("me/experts")
    chat_tokenizer.push_to_hub("me/experts")
    return logits_of(model)


def test_an_adapter_comes_back_from_the_hub_and_later_from_its_cache(hub, pushed, monkeypatch):
    files = set(hub.repositories["me/experts"])
    assert files >= {"adapter.safetensors", "molora.json", "README.md", "tokenizer.json"}
    assert "model.safetensors" not in files and "config.json" not in files
    model, tokenizer = molora.load("me/experts", **LOADED)
    assert torch.equal(logits_of(model), pushed) and tokenizer.eos_token == "<|im_end|>"

    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits_of(molora.load("me/experts", **LOADED)[0]), pushed)
    assert not hub.asked


def test_a_stage_starts_from_the_hub_and_commands_take_the_name(hub, pushed, tiny_model_dir, rows_file, tmp_path):
    tree = {"model_name": "me/experts", "device": "cpu", "injection": SHAPE}
    settings = config.check(config.Config, tree | {"model": {"load_precision": {"mode": "fp32"}}})
    assert torch.equal(logits_of(adapter.build(settings)[0]), pushed)
    assert adapter.describe_base(settings)[0].hidden_size == 64
    assert evaluate.fingerprint("me/experts")["base"] == evaluate.fingerprint(tiny_model_dir)

    for command in ("export", "merge"):
        convert.main([command, "me/experts", str(tmp_path / command), "--device", "cpu", "--precision", "fp32"])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert torch.equal(logits_of(whole), pushed)
    huggingface_hub.create_repo("me/whole")
    huggingface_hub.upload_folder(repo_id="me/whole", folder_path=tmp_path / "export")
    assert torch.equal(logits_of(molora.load("me/whole", **LOADED)[0]), pushed)
    options = ["--bench", str(rows_file), "--limit", "2", "--device", "cpu", "--kept", str(tmp_path / "kept")]
    output = tmp_path / "results.json"
    models = ("base", "me/experts", "me/whole")
    evaluate.main([*(f"--model={name}" for name in models), *options, "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    losses = [{name: group["loss"] for name, group in result["groups"].items()} for result in results]
    assert losses[0] != losses[1] == losses[2]
    with pytest.raises(molora.UserError, match="none that can be fetched"):
        convert.main(["merge", "me/nothing", str(tmp_path / "nothing")])


def test_folders_are_not_looked_up_and_a_base_on_the_hub_costs_one_question(hub, tiny_model_dir, tmp_path):
    model, _ = molora.load(tiny_model_dir, **LOADED)
    molora.save_adapter(molora.inject(model, SHAPE), tmp_path / "adapter")
    molora.load(tmp_path / "adapter", **LOADED)
    assert not hub.asked

    hub.repositories["me/base"] = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
    base, _ = molora.load("me/base", **LOADED)
    assert torch.equal(logits_of(base), logits_of(molora.load(tiny_model_dir, **LOADED)[0]))
    assert [asked for asked in hub.asked if "molora.json" in asked] == ["HEAD /me/base/resolve/main/molora.json"]


def test_what_cannot_be_had_is_refused_with_the_reason(hub, pushed, monkeypatch):
    with pytest.raises(molora.UserError, match="cannot be loaded"):
        molora.load("me/nothing")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(molora.UserError, match="cannot be loaded"):  # never fetched
            molora.load("me/experts")

    hub.lost = {"adapter.safetensors"}
    with pytest.raises(molora.UserError, match=r"me/experts: .* cannot be had \(.*adapter\.safetensors"):
        molora.load("me/experts")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(molora.UserError, match=r"cannot be had.*without HF_HUB_OFFLINE"):  # half fetched
            molora.load("me/experts")
    hub.lost.clear()

    manifest = json.loads(hub.repositories["me/experts"]["molora.json"])
    hub.repositories["me/experts"]["molora.json"] = json.dumps(manifest | {"base_model": "/gone"}).encode()
    with pytest.raises(molora.UserError, match=r"'/gone' is gone.* a folder or a hub name"):
        molora.load("me/experts")


def test_without_a_network_molora_asks_the_hub_in_one_round(hub, tiny_model_dir, tmp_path, monkeypatch):
    """A round is six requests with five naps between them, by the hub's own client."""
    hub.repositories["me/base"] = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
    expected = logits_of(molora.load("me/base", **LOADED)[0])
    model, _ = molora.load(tiny_model_dir, **LOADED)
    model.molora_base = "me/nothing"
    molora.save_adapter(molora.inject(model, SHAPE), tmp_path / "adapter")
    naps: list[float] = []
    monkeypatch.setattr("time.sleep", naps.append)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.endpoint, constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(molora.UserError, match=r"'me/nothing' .* hub cannot be asked for it \(.*refused"):
        molora.load("me/nothing", **LOADED)
    assert len(naps) == 5
    naps.clear()
    with pytest.raises(molora.UserError, match="'me/nothing' cannot be loaded"):
        molora.load(tmp_path / "adapter", **LOADED)
    assert len(naps) <= 10  # transformers' own two rounds for the base
    assert torch.equal(logits_of(molora.load("me/base", **LOADED)[0]), expected)  # from the cache


def test_an_adapter_of_peft_comes_back_through_peft_and_molora_says_so(hub, tiny_model_dir):
    peft = pytest.importorskip("peft")
    from molora.peft import MoloraConfig

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = peft.get_peft_model(base, MoloraConfig(injection=SHAPE))
    model.push_to_hub("me/peft")
    assert set(hub.repositories["me/peft"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(base, "me/peft")), logits_of(model))
    again = peft.AutoPeftModelForCausalLM.from_pretrained("me/peft", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(model))
    with pytest.raises(molora.UserError, match=r"'me/peft' is an adapter that PEFT saved.*import molora\.peft"):
        molora.load("me/peft")
