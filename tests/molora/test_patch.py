"""Injection is exact at step 0, complete, strict about its targets, and reversible."""

from __future__ import annotations

import copy
import threading
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import molora
import molora_kernels
from molora import routing
from molora.config import MoE, check
from molora.layers import LoraLinear, LoraMLP, SharedInput

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLACEMENTS = {
    "recipe": {"injection": {"lora_r": 4}},
    "one router a block": {"injection": {"lora_r": 4}, "moe": {"router_scope": "mlp"}},
    "one LoRA": {"injection": {"lora_r": 4, "strategy": "dense_lora"}},
    "mixture everywhere": {"injection": {"lora_r": 4, "target_keywords": ALL}},
    "part of the MLP": {"injection": {"lora_r": 4, "target_keywords": ["gate_proj", "o_proj"]}},
    "MLP alone": {"injection": {"lora_r": 4, "attn_lora": {"enabled": False}}},
    "loss-free balance": {"injection": {"lora_r": 4}, "moe": {"load_balance": {"type": "aux_loss_free"}}},
}


@pytest.fixture(scope="module")
def base(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(tiny_config).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, 7:] = 0
    mask[2, 4:] = 0
    return {"input_ids": torch.randint(0, 320, (3, 11), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_model_starts_as_the_base_and_remove_brings_it_back(base, batch, placement, dtype):
    model = copy.deepcopy(base).to(dtype)
    expected = model(**batch).logits
    names = [name for name, _ in model.named_parameters()]

    molora.inject(model, placement)
    assert torch.equal(model(**batch).logits, expected)
    assert any(isinstance(module, LoraLinear) for module in model.modules())

    molora.remove(model)
    assert torch.equal(model(**batch).logits, expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, LoraLinear | LoraMLP) for module in model.modules())


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_exactly_the_adapters_train_and_all_of_them_get_a_gradient(base, batch, placement):
    model = copy.deepcopy(base)
    config = copy.deepcopy(placement)
    config["injection"]["init_b_std"] = 0.02
    molora.inject(model, config)
    groups = molora.parameter_groups(model)
    adapters = {name: p for group in groups.values() for name, p in group}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapters)
    assert all(p.dtype == torch.float32 for p in adapters.values())

    model(**batch).logits.square().mean().backward()
    still = [name for name, p in adapters.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still
    assert all(p.grad is None for name, p in model.named_parameters() if name not in adapters)


def test_groups_are_those_of_the_recipe(base):
    model = copy.deepcopy(base)
    molora.inject(model, PLACEMENTS["recipe"])
    groups = molora.parameter_groups(model)
    layers = 2
    assert len(groups["lora"]) == layers * 3 * 2 and all(".mlp." in name for name, _ in groups["lora"])
    assert len(groups["attn_lora"]) == layers * 4 * 2 and all(".self_attn." in name for name, _ in groups["attn_lora"])
    assert len(groups["router"]) == layers * 3 * 2
    assert routing.names(model)[:3] == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize("strategy", ["mixture_lora", "dense_lora"])
def test_groups_go_into_an_optimizer_with_their_names(base, batch, strategy):
    model = molora.inject(copy.deepcopy(base), {"lora_r": 4, "strategy": strategy})
    groups = molora.parameter_groups(model)
    optimizer = torch.optim.AdamW([{"params": members} for members in groups.values() if members], lr=1e-4)
    named = [dict(zip(group["param_names"], group["params"], strict=True)) for group in optimizer.param_groups]
    assert named == [dict(members) for members in groups.values() if members]


def test_experts_compute_what_the_formula_says(base, batch):
    """One projection with hand-made gates, in fp64, against the sum over chosen experts."""
    model = copy.deepcopy(base).double()
    molora.inject(model, {"lora_r": 4, "lora_alpha": 6.0, "init_b_std": 0.1, "target_keywords": ["down_proj"]})
    layer: LoraLinear = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.base.in_features, dtype=torch.float64)

    probs = torch.softmax(x @ layer.router.weight.double().T + layer.router.bias.double(), -1)
    expected = x @ layer.base.weight.T
    for t in range(5):
        best = probs[t].topk(2).indices
        for e in best:
            gate = probs[t, e] / probs[t, best].sum()
            a, b = layer.lora_a[4 * e : 4 * e + 4].double(), layer.lora_b[:, 4 * e : 4 * e + 4].double()
            expected[t] += 6.0 / 4 * gate * (b @ (a @ x[t]))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_projections_that_share_an_input_are_computed_together_and_alone(base):
    """q, k and v come from one call; another tensor in between never gets the first one's outputs."""
    model = copy.deepcopy(base)
    molora.inject(model, {"lora_r": 4, "init_b_std": 0.1})
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.shared is attention.k_proj.shared is attention.v_proj.shared
    assert attention.o_proj.shared is not attention.q_proj.shared
    x, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    together = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    mixed = [attention.q_proj(x), attention.k_proj(other), attention.v_proj(x)]
    assert torch.equal(together[0], mixed[0]) and torch.equal(together[2], mixed[2])
    assert not torch.equal(together[1], mixed[1])
    for projection, y in zip((attention.q_proj, attention.k_proj, attention.v_proj), together, strict=True):
        plain = x @ projection.base.weight.T + projection.scaling * x @ projection.lora_a.T @ projection.lora_b.T
        torch.testing.assert_close(y, plain)


def test_layer_choice(base):
    model = copy.deepcopy(base)
    molora.inject(model, {"lora_r": 2, "layer_indices": [1]})
    assert all(
        name.startswith("model.layers.1.") for group in molora.parameter_groups(model).values() for name, _ in group
    )
    model = copy.deepcopy(base)
    molora.inject(model, {"lora_r": 2, "start_layer": 0, "num_layers": 1})
    assert all(
        name.startswith("model.layers.0.") for group in molora.parameter_groups(model).values() for name, _ in group
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_keywords": ["gate_porj"]}, "gate_porj"),
        ({"attn_lora": {"keywords": ["qkv"]}}, "qkv"),
        ({"attn_lora": {"keywords": ["gate_proj"]}}, "gate_proj"),  # a target, and none of attention's
        ({"layer_indices": [2]}, "numbered from 0"),
        ({"start_layer": 5}, "start_layer"),
        ({"injection": {"target_keywords": ["gate_proj"]}, "moe": {"router_scope": "mlp"}}, "router_scope"),
        ({"lora_rank": 4}, "lora_r"),
        ({"num_experts": 4, "moe": {}}, r"did you mean 'injection\.num_experts'"),
        ({"num_experts": 4, "router_z_loss_coef": 0.1}, r"did you mean 'moe\.router_z_loss_coef'"),
        (None, "injection: "),
    ],
)
def test_bad_targets_are_refused_and_the_model_is_left_alone(base, config, message):
    model = copy.deepcopy(base)
    with pytest.raises(molora.UserError, match=message):
        molora.inject(model, config)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_router_settings_are_taken_as_a_mapping_too(base):
    model = molora.inject(copy.deepcopy(base), {"lora_r": 2}, {"router_scope": "mlp"})
    assert model.molora.moe == MoE(router_scope="mlp")
    for moe, message in (({"router_scop": "mlp"}, "moe: .*did you mean 'router_scope'"), (3, "moe: input")):
        with pytest.raises(molora.UserError, match=message):
            molora.inject(copy.deepcopy(base), {"lora_r": 2}, moe)


def test_one_router_a_block_needs_swiglu_and_a_refusal_freezes_nothing(tiny_config):
    config = copy.deepcopy(tiny_config)
    config.hidden_act = "gelu"
    model = LlamaForCausalLM(config)
    with pytest.raises(molora.UserError, match="hidden_act"):
        molora.inject(model, {"injection": {"lora_r": 2}, "moe": {"router_scope": "mlp"}})
    assert all(p.requires_grad for p in model.parameters())
    molora.inject(model, {"lora_r": 2})  # a router a projection works with any activation


def test_patching_twice_and_unknown_architectures_are_refused(base):
    model = copy.deepcopy(base)
    molora.inject(model, {"lora_r": 2})
    with pytest.raises(molora.UserError, match="already"):
        molora.inject(model, {"lora_r": 2})
    with pytest.raises(molora.UserError, match=r"families\.py"):
        molora.inject(nn.Linear(3, 3), {"lora_r": 2})
    with pytest.raises(molora.UserError, match="causal LM"):
        molora.inject(copy.deepcopy(base).model, {"lora_r": 2})
    with pytest.raises(ValueError, match="no molora adapters"):
        molora.remove(copy.deepcopy(base))
    with pytest.raises(ValueError, match="no molora adapters"):
        molora.parameter_groups(base)


def test_generation_with_a_cache_gives_the_tokens_of_full_forwards(base):
    model = copy.deepcopy(base)
    molora.inject(model, {"lora_r": 4, "init_b_std": 0.3})
    ids = torch.randint(1, 320, (1, 6), generator=torch.Generator().manual_seed(0))
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


@pytest.mark.parametrize("recording", [False, True])
def test_patched_mlp_compiles_without_a_graph_break(base, recording):
    """With a record, the router losses are combined after the forward, as in training, and must not be lost."""
    model = copy.deepcopy(base)
    molora.inject(model, {"lora_r": 4, "init_b_std": 0.1})
    mlp = model.model.layers[1].mlp
    x, upstream = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    moe = check(MoE, {"router_z_loss_coef": 10.0, "load_balance": {"aux_loss_coef": 10.0}})

    def gradients(module: nn.Module) -> list[torch.Tensor]:
        mlp.zero_grad()
        if recording:
            record = routing.record(model, torch.ones(2, 5))
            with routing.using(model, record):
                y = module(x)
                routing.combine(model, [record], moe)
                (y * upstream).sum().backward()
        else:
            (module(x) * upstream).sum().backward()
        return [p.grad.clone() for p in mlp.parameters() if p.grad is not None]

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled), gradients(mlp), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("scope", ["projection", "mlp"])
@pytest.mark.parametrize("trainable", [["router"], ["lora"], ["attn_lora"], ["router", "lora"]], ids="+".join)
def test_what_a_phase_trains_gets_the_gradient_that_the_reference_gives_it(base, batch, trainable, scope):
    """Also in the first layer, whose input needs no gradient; and gate and up train through frozen routers."""
    model = copy.deepcopy(base)
    molora.inject(model, {"injection": {"lora_r": 4, "init_b_std": 0.1}, "moe": {"router_scope": scope}})
    groups = molora.parameter_groups(model)
    for name, members in groups.items():
        for _, parameter in members:
            parameter.requires_grad_(name in trainable)
    chosen = [item for name in trainable for item in groups[name]]

    def gradients(backend) -> list[torch.Tensor]:
        with molora_kernels.use_backend(backend):
            loss = model(**batch).logits.square().mean()
            return list(torch.autograd.grad(loss, [p for _, p in chosen]))

    for (name, _), actual, expected in zip(chosen, gradients("torch"), gradients("reference"), strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm(), name


def test_adapters_take_the_mode_of_the_model(base, batch):
    model = copy.deepcopy(base).eval()
    molora.inject(model, {"lora_r": 4, "init_b_std": 0.1, "lora_dropout": 0.5})
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_masters_stay_fp32_when_the_model_is_cast(base):
    model = copy.deepcopy(base)
    molora.inject(model, {"lora_r": 4})
    adapters = [p for group in molora.parameter_groups(model).values() for _, p in group]
    before = [p.detach().clone() for p in adapters]
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.gate_proj.base.weight.dtype == torch.bfloat16
    assert all(torch.equal(p, b) and p.dtype == torch.float32 for p, b in zip(adapters, before, strict=True))
    model.double()
    assert all(p.dtype == torch.float64 for p in adapters)


def test_autocast_runs_the_patched_model_as_it_runs_the_base(base, batch):
    model = copy.deepcopy(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**batch).logits
    molora.inject(model, {"lora_r": 4})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**batch).logits
        logits.float().square().mean().backward()
    assert torch.equal(logits, expected)
    assert all(p.grad is not None for group in molora.parameter_groups(model).values() for _, p in group)


def test_outputs_that_wait_are_dropped_when_the_call_is_not_the_one_they_were_computed_for(base):
    model = copy.deepcopy(base)
    molora.inject(model, {"lora_r": 4, "init_b_std": 0.1})
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad
    attention.q_proj(x)
    copy.deepcopy(model)  # outputs of a graph cannot be copied
    x.mul_(2)
    torch.testing.assert_close(attention.v_proj(x), attention.v_proj(x.clone()))


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_a_whole_model_is_saved_and_loaded(base, batch, placement, tmp_path):
    model = molora.inject(copy.deepcopy(base), placement)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    again.molora_base = "somewhere"
    again.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "molora.json").is_file()


@pytest.mark.parametrize("path", ["mlp", "mlp.up_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("placement", ["recipe", "one LoRA"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("when", ["before", "after", "after, within"])
def test_hooks_on_what_is_patched_stay_in_force(base, batch, path, placement, grad, when):
    """Those that are put on it later too; there a hook on a linear is called by the one that replaces it."""
    model, halve = copy.deepcopy(base), (lambda module, args, output: output * 0.5)
    hook = model.model.layers[1].get_submodule(path).register_forward_hook(halve)
    expected = model(**batch).logits
    if when != "before":
        hook.remove()
    molora.inject(model, PLACEMENTS[placement])
    hooked = model.model.layers[1].get_submodule(path)
    if when != "before":
        (hooked.base if when == "after, within" and path != "mlp" else hooked).register_forward_hook(halve)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)


def test_an_mlp_whose_projections_are_called_for_their_hooks_trains_as_before(base, batch):
    """Experts, routers and their losses."""
    model = molora.inject(
        copy.deepcopy(base), {"injection": {"lora_r": 4, "init_b_std": 0.1}, "moe": {"router_z_loss_coef": 1.0}}
    ).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected, seen = gradients(), []
    down = model.model.layers[0].mlp.down_proj
    down.register_full_backward_pre_hook(lambda module, upstream: seen.append(upstream))
    assert len(expected) > 20
    for actual, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
    assert len(seen) == 1


@pytest.mark.parametrize("scope", ["projection", "mlp"])
def test_hooks_that_an_mlp_with_one_router_does_not_call_are_refused(base, batch, scope):
    model = molora.inject(
        copy.deepcopy(base), {"lora_r": 4}, check(MoE, {"router_scope": "mlp", "expert_scope": scope})
    )
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(molora.UserError, match="put them on the MLP"):
        model(**batch)


def test_an_offloaded_base_is_refused(base):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(copy.deepcopy(base), execution_device=torch.device("cpu"))
    with pytest.raises(molora.UserError, match="offloaded"):
        molora.inject(model, PLACEMENTS["recipe"])


def test_a_base_on_several_devices_is_refused(base):
    model = copy.deepcopy(base)
    model.model.layers[1].to("meta")
    with pytest.raises(molora.UserError, match=r"several devices \(cpu, meta"):
        molora.inject(model, PLACEMENTS["recipe"])


def test_a_base_parameter_that_is_replaced_is_not_held(base):
    """Sharding puts others in their places; whole ones would fill the memory that it is to spare."""
    model = copy.deepcopy(base)
    weights = [weakref.ref(p) for p in model.parameters()]
    molora.inject(model, PLACEMENTS["recipe"])
    replaced = 0
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if any(p is weak() for weak in weights):
                setattr(module, name, nn.Parameter(p.detach().clone(), requires_grad=False))
                replaced += 1
        p = None
    model.tie_weights()
    assert replaced >= len(weights)
    assert [weak for weak in weights if weak() is not None] == []
    molora.remove(model)
    assert all(p.requires_grad for p in model.parameters())


def test_threads_do_not_take_what_waits_for_another(base, monkeypatch):
    model = molora.inject(copy.deepcopy(base), PLACEMENTS["recipe"])
    attention, computed = model.model.layers[0].self_attn, []
    compute = SharedInput._compute
    monkeypatch.setattr(SharedInput, "_compute", lambda self, x: (computed.append(x), compute(self, x))[1])
    mine, others = torch.randn(2, 1, 3, 64).unbind(0)
    attention.q_proj(mine)
    other = threading.Thread(target=attention.q_proj, args=(others,))
    other.start()
    other.join()
    attention.k_proj(mine)
    assert len(computed) == 2


def test_an_architecture_whose_mlp_has_another_name(base):
    model = copy.deepcopy(base)
    model.config.model_type = "novel"
    for layer in model.model.layers:
        layer.feed_forward = layer.mlp
        del layer.mlp
    molora.inject(model, {"lora_r": 4})
    assert isinstance(model.model.layers[0].feed_forward.up_proj, LoraLinear)
