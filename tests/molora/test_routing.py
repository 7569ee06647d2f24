"""Router losses: their values, and their gradient against autograd of the formula, however the forward is run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import molora
from molora import decode, routing
from molora.config import MoE, check

MOE = check(MoE, {"router_z_loss_coef": 0.01, "load_balance": {"aux_loss_coef": 0.1}})


@pytest.fixture(scope="module")
def patched(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(tiny_config).double()
        molora.inject(model, {"lora_r": 4, "init_b_std": 0.05})
    for group in molora.parameter_groups(model).values():
        for _, parameter in group:
            parameter.data = parameter.data.double()
    return model


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 320, (4, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[2, 3:] = 0
    return ids, mask


def adapters(model) -> list[torch.nn.Parameter]:
    return [p for group in molora.parameter_groups(model).values() for _, p in group]


def router_logits(model, ids, mask) -> list[torch.Tensor]:
    """Each router's logits over valid tokens, by hooks on what it reads; in the order of the ledger."""
    logits: dict[str, torch.Tensor] = {}
    valid = mask.bool()
    handles = []
    for index, layer in enumerate(model.model.layers):

        def hook(module, args, index=index):
            x = args[0]
            gate, up, down = module.projections()
            h = torch.nn.functional.silu(_dense(gate, x)) * _dense(up, x)
            for name, projection, read in (("gate", gate, x), ("up", up, x), ("down", down, h)):
                router = projection.router
                logits[f"{index}{name}"] = (read @ router.weight.T + router.bias)[valid]

        handles.append(layer.mlp.register_forward_pre_hook(hook))
    model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return list(logits.values())


def _dense(projection, x):
    """A projection with its experts, in autograd's own operations."""
    probs = torch.softmax(x @ projection.router.weight.T + projection.router.bias, -1)
    kept = torch.zeros_like(probs).scatter(-1, probs.topk(2, -1).indices, 1.0) * probs
    gates = kept / kept.sum(-1, keepdim=True)
    s = (x @ projection.lora_a.T).unflatten(-1, (projection.experts, -1)) * gates.unsqueeze(-1)
    return x @ projection.base.weight.T + projection.scaling * s.flatten(-2) @ projection.lora_b.T


def formula(model, ids, mask) -> torch.Tensor:
    """The router losses straight from their definitions (recipe: mean over routers, valid tokens only)."""
    total = torch.zeros((), dtype=torch.float64)
    all_logits = router_logits(model, ids, mask)
    for logits in all_logits:
        probs = torch.softmax(logits, -1)
        fraction = torch.zeros_like(probs).scatter(-1, probs.topk(2, -1).indices, 1.0).mean(0)
        z = torch.logsumexp(logits, -1).square().mean()
        balance = 4 * (fraction / 2 * probs.mean(0)).sum()
        total = total + 0.01 * z + 0.1 * balance
    return total / len(all_logits)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_is_that_of_the_formula(patched, batch, checkpointing, accumulation):
    """With a training loss of zero, what arrives at the parameters is the router losses' gradient alone."""
    ids, mask = batch
    model = copy.deepcopy(patched).train()
    expected = torch.autograd.grad(formula(model, ids, mask), adapters(model), allow_unused=True)

    if checkpointing != "none":
        reentrant = checkpointing == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    records, losses = [], []
    for rows in torch.arange(4).chunk(accumulation):
        record = routing.record(model, mask[rows])
        with routing.using(model, record):
            losses.append(model(ids[rows], attention_mask=mask[rows]).logits.sum() * 0.0)
        records.append(record)
    value = routing.combine(model, records, MOE)
    for loss, record in zip(losses, records, strict=True):
        with routing.using(model, record):
            loss.backward()

    torch.testing.assert_close(value.total, formula(model, ids, mask).float(), rtol=1e-5, atol=1e-6)
    scale = max(g.abs().max() for g in expected if g is not None)
    for parameter, gradient in zip(adapters(model), expected, strict=True):
        wanted = torch.zeros_like(parameter) if gradient is None else gradient
        # the gradient of the sums travels in fp32
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-6 * scale.item())


def test_micro_batch_scope_weights_each_by_its_tokens(patched, batch):
    ids, mask = batch
    model = copy.deepcopy(patched).train()
    expected = 0
    for rows in torch.arange(4).chunk(2):
        expected = expected + formula(model, ids[rows], mask[rows]) * mask[rows].sum() / mask.sum()
    expected = torch.autograd.grad(expected, adapters(model), allow_unused=True)
    for rows in torch.arange(4).chunk(2):
        record = routing.record(model, mask[rows])
        with routing.using(model, record):
            loss = model(ids[rows], attention_mask=mask[rows]).logits.sum() * 0.0
            routing.combine(model, [record], MOE, total_tokens=mask.sum())
            loss.backward()
    scale = max(g.abs().max() for g in expected if g is not None).item()
    for parameter, gradient in zip(adapters(model), expected, strict=True):
        wanted = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-6 * scale)


def test_padding_changes_nothing(patched, batch):
    """More padding, and other tokens in it, leave losses, loads and gradients as they are."""
    ids, mask = batch
    model = copy.deepcopy(patched).train()

    def run(ids, mask):
        model.zero_grad()
        record = routing.record(model, mask)
        with routing.using(model, record):
            loss = model(ids, attention_mask=mask).logits.sum() * 0.0
            losses = routing.combine(model, [record], MOE)
            loss.backward()
        return losses, [p.grad.clone() for p in adapters(model)]

    losses, gradients = run(ids, mask)
    wider = torch.nn.functional.pad(ids, (0, 5), value=7)
    wider = torch.where(torch.nn.functional.pad(mask, (0, 5)).bool(), wider, 11)
    padded_losses, padded_gradients = run(wider, torch.nn.functional.pad(mask, (0, 5)))
    torch.testing.assert_close(padded_losses, losses)
    for a, b in zip(padded_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def made_up(counts: list[list[float]], probs: list[list[float]], logits_of: float = 0.0):
    """Losses of routers with these choices and mean probabilities over 8 tokens."""
    model = torch.nn.Linear(1, 1)
    ledger = routing.Ledger(names=[f"r{i}" for i in range(len(counts))], experts=4, top_k=2)
    model.molora = type("State", (), {"ledger": ledger})()
    record = routing.record(model, torch.ones(2, 4))
    record.counts = 8 * torch.tensor(counts)
    lse = math.log(4) + logits_of
    record.sums = torch.cat([torch.full((len(counts), 1), 8 * lse**2), 8 * torch.tensor(probs)], dim=1)
    return routing.combine(model, [record], MOE)


def test_vectors_of_the_recipe():
    balanced = made_up([[0.5] * 4], [[0.25] * 4])
    assert balanced.z_loss.item() == pytest.approx(math.log(4) ** 2) == pytest.approx(1.9218, abs=1e-4)
    assert balanced.load_balance.item() == pytest.approx(1.0)
    collapsed = made_up([[1, 1, 0, 0]], [[0.5, 0.5, 0, 0]])
    assert collapsed.load_balance.item() == pytest.approx(2.0)
    opposite = made_up([[1, 1, 0, 0], [0, 0, 1, 1]], [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert opposite.load_balance.item() == pytest.approx(2.0)


def test_balance_is_transformers_divided_by_k(patched, batch):
    """On one router ``load_balancing_loss_func`` is k times ours; over routers it pools tokens, ours averages."""
    ids, mask = batch
    model = copy.deepcopy(patched).eval()
    record = routing.record(model, mask)
    with routing.using(model, record), torch.no_grad():
        model(ids, attention_mask=mask)
    ours = routing.combine(model, [record], MOE).load_balance
    with torch.no_grad():
        theirs = [
            load_balancing_loss_func((logits,), num_experts=4, top_k=2) for logits in router_logits(model, ids, mask)
        ]
    torch.testing.assert_close(ours, (torch.stack(theirs).mean() / 2).float(), rtol=1e-5, atol=1e-6)


def test_loss_free_bias_moves_against_the_load_and_only_the_choice(tiny_config):
    model = LlamaForCausalLM(tiny_config)
    moe = check(MoE, {"router_z_loss_coef": 0.0, "load_balance": {"type": "aux_loss_free", "bias_update_speed": 0.5}})
    molora.inject(model, {"lora_r": 2}, moe)
    ids = torch.randint(0, 320, (4, 9))

    def run() -> routing.Record:
        record = routing.record(model, torch.ones_like(ids))
        with routing.using(model, record), torch.no_grad():
            model(ids)
        return record

    record = run()
    routing.step_bias(model, [record], moe)
    state = model.molora
    for row, router in enumerate(state.routers):
        below = record.counts[row] < record.counts[row].mean()
        assert (router.selection_bias[below] == 0.5).all() and (router.selection_bias[~below] <= 0).all()
    after = run()
    # half a unit of probability outweighs every difference there was, so the load moves to the others
    assert all(
        (
            after.counts[r][record.counts[r] < record.counts[r].mean()]
            > record.counts[r][record.counts[r] < record.counts[r].mean()]
        ).all()
        for r in range(6)
    )


def test_models_without_routers_have_zero_losses(tiny_config):
    model = LlamaForCausalLM(tiny_config)
    molora.inject(model, {"lora_r": 2, "strategy": "dense_lora"})
    record = routing.record(model, torch.ones(1, 3))
    with routing.using(model, record):
        model(torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    assert routing.combine(model, [record], MOE).total.item() == 0
    with pytest.raises(ValueError, match="inject"):
        routing.record(torch.nn.Linear(2, 2), torch.ones(1, 1))


def test_gates_of_every_token(patched, batch) -> None:
    ids, mask = batch
    record = routing.record(patched, mask, per_token=True)
    with routing.using(patched, record), torch.no_grad():
        patched(ids, attention_mask=mask)
        logits = router_logits(patched, ids, mask)
    for gates, of_router in zip(record.gates, logits, strict=True):
        top, chosen = torch.softmax(of_router, -1).topk(2, -1)
        expected = torch.zeros_like(of_router).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        torch.testing.assert_close(gates[mask.bool()], expected.float())


def test_counts_by_group_add_up_to_the_counts(patched, batch) -> None:
    ids, mask = batch
    record = routing.record(patched, mask, per_token=True)
    with routing.using(patched, record):
        patched(ids, attention_mask=mask)
    group = torch.tensor([[0], [2], [0], [2]]).expand(ids.shape).masked_fill(mask == 0, -1)
    counts = record.counts_by(group, 3)
    torch.testing.assert_close(counts.sum(0), record.counts)
    assert counts[0].sum(-1).tolist() == [2.0 * 10] * len(record.counts)  # two experts for each of 7 + 3 tokens
    assert not counts[1].any()


@pytest.mark.parametrize("scope", ["projection", "mlp"])
def test_observing_sees_each_forward_and_leaves_the_model_as_it_was(tiny_config, batch, scope: str) -> None:
    model = LlamaForCausalLM(tiny_config).eval()
    molora.inject(
        model,
        {"injection": {"lora_r": 4, "init_b_std": 0.05, "target_keywords": ["gate_proj", "up_proj", "down_proj"]},
         "moe": {"router_scope": scope}},
    )  # fmt: skip
    ids = batch[0].repeat(2, 1)
    few = ids[:, :2]  # take a path of their own, which rounds otherwise
    assert few.numel() <= decode.MOST_TOKENS < ids.numel()
    record = routing.record(model, torch.ones_like(few), per_token=True)
    with torch.no_grad():
        expected = model(ids).logits, model(few).logits
        with routing.observing(model) as seen:
            assert torch.equal(model(ids).logits, expected[0])
            assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(few)).logits, expected[1])
        model(ids)
        with routing.using(model, record):
            model(few)
    assert [record.gates.shape[1:3] for record in seen] == [(8, 9), (8, 2)]
    torch.testing.assert_close(seen[1].gates, record.gates)
    for record in seen:
        assert len(record.gates) == len(routing.names(model)) == (6 if scope == "projection" else 2)
        torch.testing.assert_close(record.gates.sum(-1), torch.ones(record.gates.shape[:-1]))


def test_routers_by_kind_and_layer() -> None:
    names = [f"model.layers.{layer}.mlp.{kind}" for layer, kind in ((2, "gate"), (0, "gate"), (1, "down"))]
    assert routing.by_kind(names) == {"gate": {0: 1, 2: 0}, "down": {1: 2}}
    assert routing.by_kind(["model.layers.3.mlp", "router"]) == {"mlp": {3: 0}, "router": {0: 1}}
