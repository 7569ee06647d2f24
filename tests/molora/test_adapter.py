"""Adapter folders: bit-exact round trips, and refusals that name what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from molora import adapter, config
from molora.files import file_sha256

SHAPE = {"lora_r": 4, "init_b_std": 0.1}


@pytest.fixture
def saved(tiny_model_dir, tmp_path):
    """(folder, logits) of a patched model with random experts."""
    model, _ = molora.load(tiny_model_dir, device="cpu", precision="fp32")
    molora.inject(model, SHAPE)
    molora.save_adapter(model, tmp_path / "stage")
    return tmp_path / "stage", logits_of(model)


def logits_of(model) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        return model.eval()(ids).logits


def settings(folder, **injection) -> config.Config:
    tree = {"model_name": str(folder), "device": "cpu", "injection": {"lora_r": 4, **injection}}
    return config.check(config.Config, tree | {"model": {"load_precision": {"mode": "fp32"}}})


def test_loading_reproduces_the_logits_bit_for_bit(saved):
    folder, logits = saved
    model, tokenizer = molora.load(folder, device="cpu", precision="fp32")
    assert torch.equal(logits_of(model), logits)
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_next_stage_starts_where_the_last_ended_router_and_all(saved, tmp_path):
    """Through a third and fourth stage too, with another dropout, whose value is the new stage's."""
    folder, logits = saved
    for stage in range(3):
        model, _ = adapter.build(settings(folder, lora_dropout=0.05))
        assert torch.equal(logits_of(model), logits)
        assert model.model.layers[0].mlp.gate_proj.dropout == 0.05
        before = load_file(folder / adapter.WEIGHTS)
        folder = molora.save_adapter(model, tmp_path / f"next{stage}")
        after = load_file(folder / adapter.WEIGHTS)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert any("router.weight" in name for name in after)
    assert adapter.read_manifest(folder)["base_model"] == adapter.read_manifest(saved[0])["base_model"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_experts": 8}, "num_experts"),
        ({"top_k": 1}, "top_k"),
        ({"lora_r": 8}, "lora_r"),
        ({"target_keywords": ["gate_proj"]}, "target_keywords"),
        ({"attn_lora": {"enabled": False}}, "attn_lora"),
    ],
)
def test_another_shape_is_an_error_that_names_the_key(saved, change, named):
    with pytest.raises(molora.UserError, match=named):
        adapter.build(settings(saved[0], **change))


def test_a_selection_bias_that_only_one_stage_has_is_an_error_that_names_the_key(saved):
    config = settings(saved[0]).model_dump() | {"moe": {"load_balance": {"type": "aux_loss_free"}}}
    with pytest.raises(molora.UserError, match=r"moe\.load_balance\.type"):
        adapter.build(adapter.check(adapter.Config, config))


def test_another_base_of_the_same_shape_is_an_error(saved, tiny_config: LlamaConfig, tmp_path, chat_tokenizer):
    other = tmp_path / "other_base"
    torch.manual_seed(99)
    LlamaForCausalLM(tiny_config).save_pretrained(other)
    chat_tokenizer.save_pretrained(other)
    manifest = json.loads((saved[0] / adapter.MANIFEST).read_text())
    (saved[0] / adapter.MANIFEST).write_text(json.dumps(manifest | {"base_model": str(other)}))
    with pytest.raises(molora.UserError, match="another base model"):
        molora.load(saved[0], device="cpu", precision="fp32")


def test_precision_of_loading_does_not_make_another_base(saved):
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        model, _ = molora.load(saved[0], device="cpu", precision=precision)
        assert logits_of(model).dtype == dtype


def test_damaged_files_are_found(saved):
    folder, _ = saved
    weights = folder / adapter.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    with pytest.raises(molora.UserError, match="checksum"):
        molora.load(folder, device="cpu")
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    weights.write_bytes(bytes(flipped))
    with pytest.raises(molora.UserError, match="checksum"):
        molora.load(folder, device="cpu")
    weights.unlink()
    with pytest.raises(molora.UserError, match="missing"):
        molora.load(folder, device="cpu")
    weights.write_bytes(whole)
    manifest = json.loads((folder / adapter.MANIFEST).read_text())
    (folder / adapter.MANIFEST).write_text(json.dumps(manifest | {"base_model": None}))
    with pytest.raises(molora.UserError, match=r"needs the keys .*base_model \(str\)"):
        molora.load(folder, device="cpu")
    (folder / adapter.MANIFEST).write_text('{"format": 1')
    with pytest.raises(molora.UserError, match="not readable"):
        molora.load(folder, device="cpu")
    (folder / adapter.MANIFEST).write_text(json.dumps(manifest))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(molora.UserError, match=r"tokenizer\.json: cannot be read"):
        molora.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_hidden_layers": 3}, r"lack weights .*missing: model\.layers\.2\."),
        ({"intermediate_size": 96}, "cannot be loaded"),
        ({"hidden_size": "wide"}, "cannot be loaded"),
        ([], "cannot be loaded"),
    ],
)
def test_a_base_whose_files_do_not_fit_together_is_refused(tiny_model_dir, tmp_path, changed, told):
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed if changed else changed))
    with pytest.raises(molora.UserError, match=told):
        molora.load(tmp_path / "base", device="cpu")


def test_missing_extra_and_misshapen_tensors_are_named(saved):
    folder, _ = saved
    tensors = load_file(folder / adapter.WEIGHTS)
    gone = "model.layers.0.mlp.gate_proj.router.weight"
    bent = "model.layers.1.self_attn.q_proj.lora_a"
    del tensors[gone]
    tensors[bent] = tensors[bent][:, 1:].contiguous()
    tensors["model.layers.7.surprise"] = torch.zeros(1)
    save_file(tensors, folder / adapter.WEIGHTS)
    manifest = json.loads((folder / adapter.MANIFEST).read_text())
    manifest["sha256"] = file_sha256(folder / adapter.WEIGHTS)
    (folder / adapter.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(molora.UserError) as error:
        molora.load(folder, device="cpu", precision="fp32")
    assert all(name in str(error.value) for name in (gone, bent, "surprise"))


def test_nothing_by_that_name(tmp_path):
    with pytest.raises(molora.UserError, match="no folder"):
        molora.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(molora.UserError, match="cannot be loaded"):
        molora.load(tmp_path / "empty")
    with pytest.raises(molora.UserError, match="is no device"):
        molora.load(tmp_path / "empty", device="gpu0")
    for device in ("meta", "xla"):
        with pytest.raises(molora.UserError, match=f"'{device}' cannot be used here"):
            molora.load(tmp_path / "empty", device=device)
    with pytest.raises(
        molora.UserError, match=r"\(Could not run '[\w:.]+' with arguments from the 'MPS' backend\); use"
    ):
        molora.load(tmp_path / "empty", device="mps")
    with pytest.raises(molora.UserError, match=r"^precision: .*'fp32'.*\(it is 'float32'\)"):
        molora.load(tmp_path / "empty", precision="float32")


def test_a_compiled_model_is_saved_as_itself_and_one_of_peft_refused(saved, tmp_path):
    folder, logits = saved
    model, _ = molora.load(folder, device="cpu", precision="fp32")
    molora.save_adapter(torch.compile(model), tmp_path / "compiled")
    again, _ = molora.load(tmp_path / "compiled", device="cpu", precision="fp32")
    assert torch.equal(logits_of(again), logits)
    peft = pytest.importorskip("peft")
    from molora.peft import MoloraConfig

    own = peft.get_peft_model(molora.remove(model), MoloraConfig(injection={"lora_r": 4}))
    with pytest.raises(ValueError, match="save_pretrained"):
        molora.save_adapter(own.base_model.model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_failed_save_leaves_the_older_files_whole(saved, monkeypatch):
    folder, logits = saved
    model, _ = molora.load(folder, device="cpu", precision="fp32")
    with torch.no_grad():
        for group in molora.parameter_groups(model).values():
            for _, parameter in group:
                parameter.add_(1.0)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    for owner, name in ((adapter, "save_file"), (Path, "write_text")):  # the first file, and the second
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space"):
                molora.save_adapter(model, folder)
        assert sorted(path.name for path in folder.iterdir()) == [adapter.WEIGHTS, adapter.MANIFEST]
        again, _ = molora.load(folder, device="cpu", precision="fp32")
        assert torch.equal(logits_of(again), logits)


def test_a_model_made_in_memory_is_not_saved_to_a_folder_that_could_never_be_loaded(tiny_config, tmp_path):
    model = LlamaForCausalLM(tiny_config)
    molora.inject(model, SHAPE)
    with pytest.raises(ValueError, match="could never be loaded"):
        molora.save_adapter(model, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
