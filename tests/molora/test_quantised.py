"""Adapters beside a base that bitsandbytes has quantised, against the same base unpacked to plain linears."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import molora
from molora import adapter, config, convert, merge
from molora.data import read_rows
from molora.layers import is_dense
from molora.trainer import Trainer

bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = torch.arange(22).view(2, 11) * 13 % 320
SHAPE = {"lora_r": 4, "init_b_std": 0.1, "num_experts": 3}
KINDS = {
    "nf4": {"mode": "int4", "double_quant": False},
    "nf4 twice": {"mode": "int4"},
    "fp4": {"mode": "int4", "quant_type": "fp4"},
    "int8": {"mode": "int8"},
}


def quantised(folder: Path, kind: str) -> nn.Module:
    precision = config.LoadPrecision.model_validate({"compute_dtype": "fp32", **KINDS[kind]})
    return adapter.load_base(str(folder), config.Model(load_precision=precision), torch.device("cpu"))[0]


class Unpacked(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight)


def unpacked(model: nn.Module) -> nn.Module:
    """A copy whose 4-bit linears are unpacked ones of the same values, called in the same way."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain = Unpacked(module.in_features, module.out_features, bias=False)
            packed: bitsandbytes.nn.Params4bit = module.weight
            plain.weight.data = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, plain)
    return model


def results(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of a random upstream one, of the model with adapters; the adapters are drawn alike."""
    torch.manual_seed(0)
    molora.inject(model, SHAPE)
    # Where its input needs no gradient, bitsandbytes takes a kernel for inference, which is less exact.
    model.enable_input_require_grads()  # type: ignore[operator]
    logits = model(IDS).logits
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    adapters = [named for group in molora.parameter_groups(model).values() for named in group]
    assert all(parameter.grad is not None and parameter.grad.any() for _, parameter in adapters)
    return {"logits": logits.detach()} | {name: p.grad for name, p in adapters if p.grad is not None}


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "fp4"])
def test_forward_and_backward_are_those_of_the_unpacked_base(tiny_model_dir: Path, kind: str) -> None:
    model = quantised(tiny_model_dir, kind)
    expected, found = results(unpacked(model)), results(model)
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def test_backward_of_an_int8_base_reaches_every_adapter(tiny_model_dir: Path) -> None:
    """With gradients near those beside the base as it was before its weights, and now their inputs, were rounded: each
    by less than 1% of a typical one, in a few products one after another."""
    found = results(quantised(tiny_model_dir, "int8"))
    expected = results(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32))
    assert found.keys() == expected.keys()
    far = {name: (found[name] - tensor).norm() / tensor.norm() for name, tensor in expected.items()}
    assert max(far.values()) < 0.05, far
    assert min(far.values()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_the_base_and_the_base_comes_back(tiny_model_dir: Path, kind: str) -> None:
    model = quantised(tiny_model_dir, kind)
    linear = model.get_submodule("model.layers.0.mlp.gate_proj")
    assert isinstance(linear, nn.Linear) and not is_dense(linear)
    with torch.no_grad():
        expected = model(IDS).logits
        molora.inject(model, SHAPE | {"init_b_std": 0.0})
        assert torch.equal(model(IDS).logits, expected)
    assert {p.dtype for group in molora.parameter_groups(model).values() for _, p in group} == {torch.float32}
    molora.remove(model)
    assert model.get_submodule("model.layers.0.mlp.gate_proj") is linear


def test_generation_uses_the_quantised_base(tiny_model_dir: Path) -> None:
    model = quantised(tiny_model_dir, "nf4")
    plain = unpacked(model)
    written = []
    for each in (model, plain):
        torch.manual_seed(0)
        molora.inject(each, SHAPE).eval()
        written.append(each.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False))  # type: ignore[operator]
    assert written[0].shape == (2, 16)
    assert torch.equal(*written)


def test_one_router_a_block_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(molora.UserError, match=r"router_scope.*quantised"):
        molora.inject(quantised(tiny_model_dir, "nf4"), {"injection": SHAPE, "moe": {"router_scope": "mlp"}})


def test_a_stage_trains_beside_it_and_the_next_one_starts_from_there(
    tiny_model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    def stage(model: Path, output: Path) -> Path:
        given = [
            f"model_name={model}", f"data.path={rows_file}", "device=cpu", "model.load_precision.mode=int4",
            "model.gradient_checkpointing=non_reentrant", "injection.lora_r=2", "training.max_train_steps=2",
        ]  # fmt: skip
        Trainer(config.resolve(config.load(None, given)), output, read_rows(rows_file)).train()
        return output / "final"

    second = stage(stage(tiny_model_dir, tmp_path / "1"), tmp_path / "2")
    model, _ = molora.load(second, device="cpu", precision="int4")
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj.base"), bitsandbytes.nn.Linear4bit)
    assert any(p.any() for name, p in molora.parameter_groups(model)["lora"] if name.endswith("lora_b"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_leaves_a_quantised_base(tiny_model_dir: Path, kind: str, tmp_path: Path) -> None:
    """One that is quantised on disk: nothing is merged into it; beside it, and whole, the adapter leaves as always."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_model_dir, base)
    quantised(tiny_model_dir, kind).save_pretrained(base)
    model, _ = molora.load(base, "cpu", "fp32")
    molora.save_adapter(molora.inject(model, SHAPE), folder)

    def run(command: str, out: Path, *more: str) -> Path:
        convert.main([command, str(folder), str(out), "--device", "cpu", "--precision", "fp32", *more])
        return out

    with pytest.raises(molora.UserError, match=r"Linear\w+ of torch.u?int8, which takes no update: merge into a LoRA"):
        run("merge", tmp_path / "merged", "--into", "base")
    assert not (tmp_path / "merged").exists()
    assert (run("merge", tmp_path / "lora") / "adapter_model.safetensors").is_file()
    whole = AutoModelForCausalLM.from_pretrained(run("export", tmp_path / "whole"), trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(whole(IDS).logits, model(IDS).logits)


def test_4_bit_weights_kept_as_floating_point_are_known_for_what_they_are(tiny_model_dir: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    path = "model.layers.0.mlp.up_proj"
    assert model.get_submodule(path).weight.dtype == torch.bfloat16
    update = merge.Update(torch.ones(2, 48), torch.ones(96, 2))
    with pytest.raises(molora.UserError, match="Linear4bit"):
        merge.into_base(model, {path: update})


def test_without_bitsandbytes_the_message_names_it(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(molora.UserError, match="pip install bitsandbytes"):
        quantised(tiny_model_dir, "nf4")
