"""Run a model over rows and keep what its routers did with each token of the answers.

Shape letters: S rows, N tokens, R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molora import chat, routing
from molora.data import Collate, Example, Row
from molora.errors import UserError
from molora.layers import LoraLinear
from molora.report import statistics


@dataclass(frozen=True)
class Observation:
    """One model's routers over the answers of some rows. Prompts are left out: the chat template's words, the same
    in every row, would hide how domains differ."""

    names: list[str]
    """R router names, such as ``model.layers.0.mlp.gate_proj``."""
    top_k: int
    domains: list[str]
    domain_of_row: Tensor
    """(S,) int64: its place in ``domains``."""
    row_of_token: Tensor
    """(N,) int64"""
    gates: Tensor
    """(N, R, E) fp16: each token's weight of each expert, zero where not chosen."""
    probabilities: Tensor
    """(domains, R, E): mean probability over a domain's tokens."""
    prompts: list[list[int]]
    answers: list[list[int]]
    """Token ids of each row; the answers' tokens, row after row, are the N tokens."""
    router_weights: list[Tensor]
    """R of (E, K + 1): weight and bias."""
    expert_cosines: dict[str, Tensor]
    """For each projection with experts (E, E), see :func:`molora.report.statistics.expert_cosines`."""

    @property
    def experts(self) -> int:
        return self.gates.shape[-1]

    def counts_of_rows(self) -> Tensor:
        """(S, R, E) fp32: tokens of each row that chose each expert."""
        chosen = (self.gates > 0).float()
        counts = torch.zeros(len(self.domain_of_row), *chosen.shape[1:])
        return counts.index_add_(0, self.row_of_token, chosen)

    def tokens_of(self, domain: int) -> int:
        return int((self.domain_of_row[self.row_of_token] == domain).sum())


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Sequence[Row]],
    *,
    max_length: int,
    batch_size: int,
) -> Observation:
    """Read every row of each domain once, without dropout.

    Raises :class:`UserError` for a model without routers and for a domain none of whose rows has an answer.
    """
    if not hasattr(model, "molora") or not routing.names(model):
        raise UserError("the model has no routers; give the final/ folder of a stage with strategy: mixture_lora")
    collate, ledger = Collate(tokenizer), routing.ledger_of(model)
    gates: list[Tensor] = []
    rows: list[Tensor] = []
    domain_of_row: list[int] = []
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    probabilities = torch.zeros(len(data), len(ledger.names), ledger.experts)
    model.eval()
    for domain, (name, of_domain) in enumerate(data.items()):
        examples = list(_examples(tokenizer, name, of_domain, max_length))
        tokens = 0.0
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size]).to(model.device)
            record = routing.record(model, batch.labels != chat.IGNORE, per_token=True)
            with routing.using(model, record):
                model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            assert record.gates is not None
            gates.append(_halved(record.gates.movedim(0, 2)[record.mask]).cpu())
            rows.append(record.mask.nonzero()[:, 0].cpu() + len(domain_of_row) + start)
            probabilities[domain] += record.sums[:, 1:].cpu()
            tokens += float(record.tokens)
        probabilities[domain] /= tokens
        domain_of_row += [domain] * len(examples)
        for example in examples:
            answered = example.labels != chat.IGNORE
            answers.append(example.input_ids[answered].tolist())
            prompts.append(example.input_ids[~answered].tolist())
    return Observation(
        names=list(ledger.names),
        top_k=ledger.top_k,
        domains=list(data),
        domain_of_row=torch.tensor(domain_of_row),
        row_of_token=torch.cat(rows),
        gates=torch.cat(gates),
        probabilities=probabilities,
        prompts=prompts,
        answers=answers,
        router_weights=[_weights(router) for router in model.molora.routers],  # type: ignore[union-attr]
        expert_cosines={
            name: statistics.expert_cosines(module.lora_a.cpu(), module.lora_b.cpu(), module.experts)
            for name, module in model.named_modules()
            if isinstance(module, LoraLinear) and module.experts > 1
        },
    )


def _halved(gates: Tensor) -> Tensor:
    """As fp16, in which no expert that was chosen becomes one that was not."""
    return torch.where(gates > 0, gates.clamp(min=torch.finfo(torch.float16).tiny), 0.0).half()


def _weights(router: Any) -> Tensor:
    return torch.cat([router.weight, router.bias[:, None]], dim=1).detach().cpu()


def _examples(
    tokenizer: PreTrainedTokenizerBase, domain: str, rows: Sequence[Row], max_length: int
) -> Iterator[Example]:
    found = False
    for row in rows:
        try:
            encoded = chat.encode_row(tokenizer, row, max_length)
        except UserError as error:
            raise UserError(f"{row.get('where', 'a row')}: {error}") from error
        if encoded.trainable:
            found = True
            yield Example(torch.tensor(encoded.input_ids), torch.tensor(encoded.labels), domain)
    if not found:
        raise UserError(f"--data {domain}=…: none of {len(rows)} rows has an answer within --max-length {max_length}")


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text; nothing where it ends within a character, which the next one completes."""
    found, written = [], 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        whole = end == len(tokens) or not text.endswith("\ufffd")
        found.append(text[written:] if whole else "")
        written = len(text) if whole else written
    return found
