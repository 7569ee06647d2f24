"""One LoRA, or no adapter at all, in place of routed experts: smaller and plainer, and no longer the same model.

A router weighs the experts token by token; what replaces it here are constant gates, so that

    delta W = (alpha / r) sum_e g_e B_e A_e

is one matrix. With the experts beside each other it is exactly a LoRA of rank E r; its best approximation of a lower
rank is its truncated singular value decomposition (Eckart and Young, 1936). Adapters without a router lose nothing.

Shape letters: K input features, N output features, E experts, r rank of one expert, P rank of the update, R routers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molora import chat, data, routing
from molora.adapter import base_name
from molora.data import Row
from molora.errors import UserError
from molora.layers import LoraLinear, is_dense
from molora.patch import remove


class Update(NamedTuple):
    """What is added to a projection's weight: ``b @ a``."""

    a: Tensor
    """(P, K) fp32"""
    b: Tensor
    """(N, P) fp32"""


@torch.no_grad()
def mean_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int = 8,
    max_length: int = 4096,
) -> Tensor:
    """(R, E) fp32: each expert's mean gate over the tokens of the rows' answers, for each router of the model; a row's
    first ``max_length`` tokens count. Raises :class:`UserError` where none of an answer is among them."""
    model.eval()
    names = routing.names(model)
    total = torch.zeros(len(names), routing.ledger_of(model).experts, device=model.device)
    tokens = 0
    examples = data.encode_rows(tokenizer, rows, max_length, held_out=True, key="max_length")
    for batch in data.batches(examples, data.Collate(tokenizer), batch_size=batch_size):
        batch = batch.to(model.device)
        answers = batch.labels != chat.IGNORE
        record = routing.record(model, batch.attention_mask, per_token=True)
        with routing.using(model, record):
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        assert record.gates is not None
        total += record.gates[:, answers].sum(1)
        tokens += int(answers.sum())
    return total / tokens


@torch.no_grad()
def static_updates(model: nn.Module, gates: Tensor | None = None) -> dict[str, Update]:
    """The update of every projection that has an adapter, by the projection's full name.

    ``gates`` (R, E) are the constant gates of each router, in the order of :func:`molora.routing.names`; None weighs
    all experts alike. Rank P is E r for routed projections and r for plain LoRAs. Raises ValueError for a model in
    which projections and routers have other names than in the one that was patched.
    """
    rows = {name: row for row, name in enumerate(routing.names(model))}
    if "molora" not in vars(model) or any(".molora_adapters." in path for path, _ in model.named_modules()):
        raise ValueError(
            "give the model that molora.inject patched or molora.load opened, not what PEFT or torch.compile made of it"
        )
    experts = routing.ledger_of(model).experts
    if gates is None:
        gates = torch.full((len(rows), experts), 1 / max(experts, 1))
    updates = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLinear):
            continue
        scale = torch.full((module.experts,), module.scaling)
        row = rows.get(path, rows.get(path.rpartition(".")[0]))  # its own router, or the one that its MLP shares
        if row is not None and module.group == "lora":
            scale = scale * gates[row].cpu()
        per_column = scale.repeat_interleave(module.rank).to(module.lora_b.device)
        updates[path] = Update(module.lora_a.detach().float().clone(), module.lora_b.detach().float() * per_column)
    return updates


def truncate(update: Update, rank: int) -> tuple[Update, float]:
    """The nearest update of rank ``rank`` in the Frobenius norm, and the share of the squared norm that it keeps."""
    if update.a.shape[0] <= rank:
        return update, 1.0
    q_b, r_b = torch.linalg.qr(update.b.double())  # (N, P), (P, P)
    q_a, r_a = torch.linalg.qr(update.a.double().T)  # (K, P), (P, P)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    kept = (s[:rank].square().sum() / s.square().sum()).item() if s.any() else 1.0
    b, a = q_b @ u[:, :rank] * root, root[:, None] * (vh[:rank] @ q_a.T)
    return Update(a.float().contiguous(), b.float().contiguous()), kept


def as_lora(model: PreTrainedModel, updates: dict[str, Update]) -> PreTrainedModel:
    """Take the experts out of ``model`` and put a plain LoRA with these updates in their places, in place."""
    remove(model).requires_grad_(False)
    for path, update in updates.items():
        rank = len(update.a)
        lora = LoraLinear(
            model.get_submodule(path),  # type: ignore[arg-type] # a linear: an adapter was on it
            group="lora", experts=1, rank=rank, alpha=rank, dropout=0.0, init_b_std=0.0, router=None,
        )  # fmt: skip
        lora.lora_a.data, lora.lora_b.data = update.a, update.b
        model.set_submodule(path, lora.eval())
    return model


@torch.no_grad()
def into_base(model: PreTrainedModel, updates: dict[str, Update]) -> PreTrainedModel:
    """Add the updates to the weights of ``model``, which has no adapters (any more), in place.

    The sum is rounded to the base's dtype. Raises :class:`UserError` for a quantised base, before anything is changed.
    """
    linears: dict[str, Any] = {path: model.get_submodule(path) for path in updates}
    linears = {path: getattr(linear, "base", linear) for path, linear in linears.items()}
    for path, linear in linears.items():
        if not is_dense(linear):
            raise UserError(
                f"{path} is a {type(linear).__name__} of {linear.weight.dtype}, which takes no update: merge into a "
                "LoRA, or make base_model in the adapter's molora.json one in bf16 or fp32"
            )
    for path, (a, b) in updates.items():
        weight: Tensor = linears[path].weight
        weight.copy_((weight.float() + b @ a).to(weight.dtype))
        model.set_submodule(path, linears[path])
    return model


def save_peft_lora(model: PreTrainedModel, updates: dict[str, Update], folder: Path) -> None:
    """Write the updates as a LoRA that ``peft.PeftModel.from_pretrained`` opens; PEFT itself is not needed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (a, b) in updates.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ranks = {path: len(update.a) for path, update in updates.items()}
    most = max(ranks.values())
    # PEFT scales by alpha / r; the scale is in B already.
    lora = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(model),
        "r": most,
        "lora_alpha": most,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(updates),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(lora, indent=2) + "\n", encoding="utf-8")
