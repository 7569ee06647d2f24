"""What leaves molora: routed models whole, and merged ones, opened by transformers and PEFT themselves."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import molora
from molora import convert, merge
from molora.errors import UserError

IDS = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(5))


def saved(tiny_model_dir: Path, folder: Path, injection: dict, *, even: bool = False, moe: dict | None = None) -> Path:
    """An adapter folder with random tensors; ``even``: routers of zeros, whose gates are all alike."""
    model, tokenizer = molora.load(tiny_model_dir, device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(6)
    molora.inject(model, {"injection": {"lora_r": 4, **injection}, "moe": moe or {}})
    for name, members in molora.parameter_groups(model).items():
        for _, parameter in members:
            scale = 0.0 if even and name == "router" else 0.1
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    molora.save_adapter(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def adapter(tiny_model_dir, tmp_path) -> Path:
    return saved(tiny_model_dir, tmp_path / "adapter", {})


def run(*arguments: object) -> None:
    convert.main([*map(str, arguments), "--device", "cpu", "--precision", "fp32"])


@pytest.mark.parametrize("what", ["adapter", "base", "above", "other"])
def test_what_is_read_and_what_is_no_model_is_never_replaced(what, tiny_model_dir, adapter, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("")
    (tmp_path / "config.json").write_text("")
    out = {"adapter": adapter, "base": tiny_model_dir, "above": tmp_path, "other": other}[what]
    with pytest.raises(UserError, match="choose another"):
        run("export", adapter, out, "--overwrite")
    assert (other / "mine.txt").exists() and (adapter / "molora.json").exists()


def test_exported_folder_opens_with_transformers_and_equal_logits(adapter, tmp_path, monkeypatch):
    expected = logits(molora.load(adapter, "cpu", "fp32")[0])
    run("export", adapter, tmp_path / "made")
    out = (tmp_path / "made").rename(tmp_path / "whole")  # nothing in it knows where it was made

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(molora.load(out, "cpu", "fp32")[0]), expected)
    assert AutoTokenizer.from_pretrained(out)("one two").input_ids
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


def test_an_exported_folder_takes_the_options_that_its_base_takes(adapter, tmp_path):
    run("export", adapter, tmp_path / "whole")

    def opened(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "whole", trust_remote_code=True, **options)

    given = {"attn_implementation": "eager", "output_hidden_states": True, "use_cache": False}
    configured = AutoConfig.from_pretrained(tmp_path / "whole", trust_remote_code=True, **given)
    configured.use_cache = False
    with pytest.raises(UserError, match="whole has no shape to make random weights of; open the folder"):
        AutoModelForCausalLM.from_config(configured, trust_remote_code=True)
    for config in (opened(**given).config, opened(config=configured).config):
        assert (config._attn_implementation, config.output_hidden_states, config.use_cache) == ("eager", True, False)
    with pytest.raises(ValueError, match="nonsense"):
        opened(attn_implementation="nonsense")
    model, info = opened(output_loading_info=True, dtype=torch.bfloat16)
    assert hasattr(model, "molora") and model.dtype == torch.bfloat16 and not info["missing_keys"]


@pytest.mark.parametrize("scope", ["projection", "mlp"])
def test_merging_experts_that_are_weighed_alike_loses_nothing(tiny_model_dir, tmp_path, rows_file, scope, capsys):
    adapter = saved(tiny_model_dir, tmp_path / "a", {"top_k": 4}, even=True, moe={"router_scope": scope})
    routed: Any = molora.load(adapter, "cpu", "fp32")[0]
    expected = logits(routed.double())  # so that nothing but what was merged is rounded
    run("merge", adapter, tmp_path / "lora", "--bench", rows_file)
    run("merge", adapter, tmp_path / "dense", "--into", "base", "--bench", rows_file)
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert dense.num_parameters() == AutoModelForCausalLM.from_pretrained(tiny_model_dir).num_parameters()
    largest = expected.abs().max().item()
    torch.testing.assert_close(logits(dense.double()), expected, rtol=0, atol=1e-5 * largest)
    printed = capsys.readouterr().out
    assert "LoRA of rank 4 and 16" in printed and printed.count("(+0.0%)") + printed.count("(-0.0%)") == 2

    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    lora: Any = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert not torch.allclose(logits(molora.load(tiny_model_dir, "cpu", "fp32")[0]).double(), expected, atol=1e-2)
    torch.testing.assert_close(logits(lora.double()), expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_keeps_the_dtype_that_it_is_stored_in_whatever_the_machine_is_fast_in(
    tiny_model_dir, tmp_path, dtype, monkeypatch
):
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype).save_pretrained(tmp_path / "base")
    adapter = saved(tmp_path / "base", tmp_path / "adapter", {})
    monkeypatch.setattr(molora.adapter, "cpu_has_fast_bf16", lambda: dtype == torch.float32)
    for command, out in (("export", "whole/base"), ("merge", "dense")):
        into = ["--into", "base"] if command == "merge" else []
        convert.main([command, str(adapter), str(tmp_path / out.partition("/")[0]), "--device", "cpu", *into])
        stored = load_file(tmp_path / out / "model.safetensors").values()
        assert {tensor.dtype for tensor in stored} == {dtype}


def test_what_merging_costs_is_measured_and_mean_gates_cost_less(adapter, tmp_path, rows_file, capsys):
    def change(*options: object) -> float:
        run("merge", adapter, tmp_path / "out", "--overwrite", "--bench", rows_file, *options)
        found = re.search(r"loss ([\d.]+) with routers, ([\d.]+) merged", capsys.readouterr().out)
        assert found
        return abs(float(found[2]) - float(found[1]))

    even, mean = change(), change("--gates", rows_file)
    assert even > 1e-3 and mean != even
    low = change("--rank", 2, "--gates", rows_file)
    assert low != mean


def test_mean_gates_are_those_of_answer_tokens(adapter, rows_file):
    model, tokenizer = molora.load(adapter, "cpu", "fp32")
    rows = [{"prompt": "one two", "response": "three four", "where": ""}]
    gates = merge.mean_gates(model, tokenizer, rows)
    assert gates.shape == (6, 4)
    torch.testing.assert_close(gates.sum(-1), torch.ones(6))
    more = merge.mean_gates(model, tokenizer, [*rows, {"prompt": "seven " * 30, "response": "three four", "where": ""}])
    assert not torch.equal(gates, more)
    with pytest.raises(UserError, match=r"within max_length=4: .* raise max_length or add answers"):
        merge.mean_gates(model, tokenizer, rows, max_length=4)
    cut = [rows[0] | {"response": "four " * 60}]  # which is no reason against them, as it is in training
    torch.testing.assert_close(merge.mean_gates(model, tokenizer, cut, max_length=60).sum(-1), torch.ones(6))


def test_updates_of_a_wrapped_model_are_refused(tiny_model_dir, adapter):
    """Their projections have other names, by which no gate would be found."""
    model, _ = molora.load(adapter, "cpu", "fp32")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    peft = pytest.importorskip("peft")
    from molora.peft import MoloraConfig

    of_peft = peft.get_peft_model(base, MoloraConfig(injection={"lora_r": 4}))
    around = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["lm_head"]))
    for wrapped in (of_peft, of_peft.get_base_model(), around, torch.compile(model)):
        with pytest.raises(ValueError, match=r"give the model that molora\.inject patched"):
            merge.static_updates(wrapped)


def test_truncated_update_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(7)
    update = merge.Update(torch.randn(8, 20, generator=generator), torch.randn(30, 8, generator=generator))
    whole = (update.b @ update.a).double()
    cut, kept = merge.truncate(update, 3)
    assert cut.a.shape == (3, 20) and cut.b.shape == (30, 3)
    s = torch.linalg.svdvals(whole)
    error = (whole - (cut.b @ cut.a).double()).norm()
    torch.testing.assert_close(error, s[3:].norm(), rtol=1e-5, atol=0)
    assert kept == pytest.approx((s[:3].square().sum() / s.square().sum()).item(), rel=1e-6)
    assert merge.truncate(update, 8)[0] is update


def test_bad_input_is_one_line_and_changes_nothing(adapter, tiny_model_dir, tmp_path):
    for arguments, message in (
        (("merge", tiny_model_dir, tmp_path / "x"), "no adapter folder"),
        (("merge", adapter, tiny_model_dir), "exists"),
        (("merge", adapter, tmp_path / "x", "--rank", 0), "at least 1"),
        (("merge", adapter, tmp_path / "x", "--bench", tmp_path / "none.jsonl"), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)
    assert not (tmp_path / "x").exists()
