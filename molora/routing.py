"""What routers did in a forward pass, and how their losses enter the gradient.

The router losses depend on sums over all valid tokens of an optimizer step, so they are not formed inside a layer.
Each layer hands its sums to the :class:`Record` of the micro-batch in hand; :func:`combine` forms the losses from the
records and writes d loss / d sums back onto them; and each layer's backward injects that gradient where its sums were
formed. Injecting, rather than adding the losses to the training loss, is what makes them survive activation
checkpointing of both kinds: the recomputed forward writes the same values to the same record and has the same
backward. The formulas are those of :func:`molora_kernels.router`.

Shape letters: R routers of the model, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molora.config import MoE


@dataclass
class Record:
    """One micro-batch as the routers saw it."""

    mask: Tensor
    """(batch, sequence) bool: the tokens that count."""
    tokens: Tensor
    """() fp32: how many."""
    sums: Tensor
    """(R, 1 + E) fp32, as :class:`molora_kernels.Routing` has them."""
    counts: Tensor
    """(R, E) fp32."""
    gradient: Tensor
    """(R, 1 + E) fp32: d loss / d sums; zero until :func:`combine` writes it; the layers' backward reads it."""
    automatic: bool = False
    """Whether the model's own hooks keep it (:mod:`molora.hooks`), and not the loop around the model."""
    passed_on: bool = False
    """Whether the forward is over, and those hooks bring the record to its backward."""
    gates: Tensor | None = None
    """(R, batch, sequence, E) fp32, where asked for: each token's weight of each expert, zero where not chosen. Who
    reads a choice from it (gate > 0) misses a chosen expert whose gate is zero in fp32, for which its logit must be 103
    nats below the leading one's; ``counts`` has it."""
    gates_only: bool = False
    """Whether nothing but ``gates`` is asked for, so that a few tokens go the way that they go when nobody looks
    (:mod:`molora.decode`) and leave ``sums`` and ``counts`` zero."""

    def counts_by(self, group: Tensor, groups: int) -> Tensor:
        """(groups, R, E) fp32: of the tokens in each group, how many chose each expert.

        ``group`` (batch, sequence), integers, names each token's group; tokens of group -1 count nowhere. Needs
        ``gates``.
        """
        assert self.gates is not None, "the record was made without per_token=True"
        member = group.unsqueeze(-1) == torch.arange(groups, device=group.device)
        return torch.einsum("rbte,btg->gre", (self.gates > 0).float(), member.float())


@dataclass
class Ledger:
    """One per patched model: the names of its routers, and the record that forward and backward use now."""

    names: list[str] = field(default_factory=list)
    experts: int = 0
    top_k: int = 1
    selection_bias: bool = False
    """Whether routers choose by a bias too (``load_balance.type: aux_loss_free``)."""
    current: Record | None = None

    def register(self, name: str) -> int:
        """Add a router; returns its row in every record."""
        self.names.append(name)
        return len(self.names) - 1


class RouterLosses(NamedTuple):
    """Values for the log; the gradient travels on the records."""

    z_loss: Tensor
    """() fp32, mean over routers."""
    load_balance: Tensor
    """() fp32, mean over routers; 1 is balance."""
    total: Tensor
    """() fp32: both with their coefficients, as they add to the training loss."""
    load: Tensor
    """(R, E) fp32: share of the choices that went to each expert; rows sum to 1."""
    tokens: Tensor
    """() fp32: valid tokens that these were formed over."""


def ledger_of(model: nn.Module) -> Ledger:
    """The ledger that :func:`molora.inject` attached; ``ValueError`` for an unpatched model."""
    state = getattr(model, "molora", None)
    if state is None:
        raise ValueError("the model has no molora adapters; call molora.inject(model, config) first")
    return state.ledger


def names(model: nn.Module) -> list[str]:
    """Router names in the order of every record's rows, e.g. ``model.layers.0.mlp.gate_proj``."""
    return list(ledger_of(model).names)


def by_kind(names: Sequence[str]) -> dict[str, dict[int, int]]:
    """Kind of projection -> decoder layer -> row in every record, layers rising; a name without a layer number is a
    kind of its own."""
    kinds: dict[str, dict[int, int]] = {}
    for row, name in enumerate(names):
        match = re.search(r"\.(\d+)\.(.+)$", name)
        layer, kind = (int(match[1]), match[2].removeprefix("mlp.")) if match else (0, name)
        kinds.setdefault(kind, {})[layer] = row
    return {kind: dict(sorted(rows.items())) for kind, rows in kinds.items()}


def record(model: nn.Module, attention_mask: Tensor, *, per_token: bool = False) -> Record:
    """An empty record for a micro-batch with this (batch, sequence) mask of valid tokens; ``per_token`` asks for each
    token's gates too."""
    ledger = ledger_of(model)
    mask = attention_mask.to(next(model.parameters()).device).bool()
    shape = (len(ledger.names), ledger.experts)
    return Record(
        mask=mask,
        tokens=mask.sum().float(),
        sums=torch.zeros(shape[0], 1 + shape[1], device=mask.device),
        counts=torch.zeros(shape, device=mask.device),
        gradient=torch.zeros(shape[0], 1 + shape[1], device=mask.device),
        gates=torch.zeros(shape[0], *mask.shape, shape[1], device=mask.device) if per_token else None,
    )


@contextmanager
def using(model: nn.Module, record: Record) -> Iterator[None]:
    """Make ``record`` the one that routers write to and read from. Needed around the forward and around the backward
    of the same micro-batch: checkpointing runs forwards inside backward. One record serves one forward; a second one
    under it would overwrite what the first wrote."""
    ledger = ledger_of(model)
    previous, ledger.current = ledger.current, record
    try:
        yield
    finally:
        ledger.current = previous


@contextmanager
def observing(model: nn.Module) -> Iterator[list[Record]]:
    """A list that gets a record with every token's gates, and nothing else to rely on, for each forward of ``model``
    inside the block.

    For looking at what a model does, such as generation, whose forwards are not the caller's own and whose numbers stay
    the same to the last bit.
    """
    ledger = ledger_of(model)
    previous, seen = ledger.current, []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"][..., 0] if inputs is None else inputs
        ledger.current = record(model, torch.ones_like(tokens, dtype=torch.bool), per_token=True)
        ledger.current.gates_only = True
        seen.append(ledger.current)

    hook = model.base_model.register_forward_pre_hook(before, with_kwargs=True)  # type: ignore[operator, union-attr]
    try:
        yield seen
    finally:
        hook.remove()
        ledger.current = previous


def _here(tensor: Tensor) -> Tensor:
    return tensor


def combine(
    model: nn.Module,
    records: Sequence[Record],
    moe: MoE | None = None,
    total_tokens: Tensor | float | None = None,
    add: Callable[[Tensor], Tensor] = _here,
) -> RouterLosses:
    """Form the router losses over ``records`` and set ``gradient`` on each of them.

    The gradient enters as that of a loss added to the training loss as it is: a scale that the training loss is
    multiplied by before backward (a gradient scaler's) does not reach it.

    Args:
        records: the micro-batches over which an expert's load f_e is counted.
        moe: the losses' coefficients; default: those that the model was injected with.
        total_tokens: valid tokens of the whole optimizer step if that is more than these records, so that
            contributions of single micro-batches add up token-weighted; default: the records' own.
        add: adds a tensor over all processes that share the step; their gradients are then to be added too.
    """
    ledger = ledger_of(model)
    routers = len(ledger.names)
    tokens = torch.stack([r.tokens for r in records]).sum()
    sums = torch.stack([r.sums for r in records]).sum(0)
    counts = torch.stack([r.counts for r in records]).sum(0)
    everywhere = add(torch.cat([tokens.view(1), sums.flatten(), counts.flatten()]))  # one message for all of them
    tokens = everywhere[0].clamp(min=1)
    sums = everywhere[1 : 1 + sums.numel()].view(sums.shape)
    counts = everywhere[1 + sums.numel() :].view(counts.shape)
    if not routers:
        zero = tokens.new_zeros(())
        return RouterLosses(zero, zero, zero, counts, tokens)

    fraction = counts / tokens  # f_e, sums to k
    balance_of = ledger.experts / ledger.top_k * fraction  # d load balance / d P_e
    z_loss = (sums[:, 0] / tokens).mean()
    load_balance = (balance_of * sums[:, 1:] / tokens).sum(-1).mean()

    settings: MoE = model.molora.moe if moe is None else moe  # type: ignore[union-attr] # set by inject
    z_coef = settings.router_z_loss_coef
    balance_coef = settings.load_balance.aux_loss_coef if settings.load_balance.type == "aux_loss" else 0.0
    share = tokens if total_tokens is None else total_tokens
    gradient = torch.cat([torch.full_like(sums[:, :1], z_coef), balance_coef * balance_of], dim=1) / (routers * share)
    for r in records:
        r.gradient.copy_(gradient)
    total = (z_coef * z_loss + balance_coef * load_balance) * (tokens / share)
    return RouterLosses(z_loss, load_balance, total, fraction / ledger.top_k, tokens)


@torch.no_grad()
def step_bias(
    model: nn.Module,
    records: Sequence[Record],
    moe: MoE,
    skipped: Tensor | None = None,
    add: Callable[[Tensor], Tensor] = _here,
) -> None:
    """Loss-free balancing (arXiv 2408.15664, algorithm 1): after an optimizer step, raise the selection bias of the
    experts that got less than the mean load and lower that of the others, by ``bias_update_speed``. Does nothing for
    the other kinds of load balance, for a router that is frozen (who freezes it means that its choices stay), nor
    where ``skipped`` () bool says that the step changed nothing. ``add`` as for :func:`combine`."""
    if moe.load_balance.type != "aux_loss_free":
        return
    counts = add(torch.stack([r.counts for r in records]).sum(0))
    direction = (counts.mean(-1, keepdim=True) - counts).sign()
    if skipped is not None:
        direction = direction.masked_fill(skipped, 0.0)
    for row, router in enumerate(model.molora.routers):  # type: ignore[union-attr] # set by inject
        if router.selection_bias is None:
            raise ValueError(
                "moe.load_balance.type is aux_loss_free here, but the model was injected with another type and its "
                "routers have no selection bias; give molora.inject the same moe settings"
            )
        if router.weight.requires_grad:
            router.selection_bias.add_(direction[row], alpha=moe.load_balance.bias_update_speed)


def collect(ledger: Ledger, rows: slice, y: Tensor, sums: Tensor, counts: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Write a layer's sums, counts and gates (one (..., E) a router) to the current record and return ``y``, through
    whose backward the gradient of the router losses flows into ``sums``. Without a current record (plain inference)
    it is just ``y``."""
    record = ledger.current
    if record is None:
        return y
    record.sums[rows] = sums.detach()
    record.counts[rows] = counts
    if record.gates is not None:
        for router, of_tokens in zip(record.gates[rows], gates, strict=True):
            router.copy_(of_tokens.detach())
    if not (torch.is_grad_enabled() and sums.requires_grad):
        return y
    return _InjectGradient.apply(y, sums, record, rows)


def write_gates(ledger: Ledger | None, rows: slice, *gates: Tensor | None) -> None:
    """Write gates (H, T, E), those of a layer's routers one after the other, to the current record if there is one."""
    if ledger is not None and ledger.current is not None and ledger.current.gates is not None:
        own = ledger.current.gates[rows]
        own.copy_(torch.cat([of for of in gates if of is not None])[: len(own)].view(own.shape))


class _InjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, sums: Tensor, record: Record, rows: slice) -> Tensor:
        ctx.record, ctx.rows = record, rows
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return dy, _read_in_backward(ctx.record.gradient, dy)[ctx.rows], None, None


@torch.library.custom_op("molora::read_in_backward", mutates_args=())
def _read_in_backward(gradient: Tensor, dy: Tensor) -> Tensor:
    """A copy of ``gradient`` as it is when backward runs. To torch.compile, which traces backward before
    :func:`combine` has written the values, this is an operator that depends on ``dy`` and so stays in backward."""
    return gradient.clone()


@_read_in_backward.register_fake
def _(gradient: Tensor, dy: Tensor) -> Tensor:
    return torch.empty_like(gradient)
