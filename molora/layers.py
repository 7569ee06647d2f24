"""The modules that patching puts in place: a linear with LoRA experts, and the MLP made of three of them.

The only module of molora that calls the kernels. Shape letters: K input features, N output features, E experts,
r rank of one expert.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import molora_kernels
from molora import decode, routing
from molora.config import Group
from molora.errors import UserError


class _Masters(nn.Module):
    """A module whose own parameters keep their precision when the model around them is cast to a narrower one.

    ``model.to(torch.bfloat16)`` halves a base; bf16 masters would lose most updates at fine-tuning learning rates.
    Moves between devices and casts to a wider dtype are followed.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Masters:
        if recurse:
            for child in self.children():
                child._apply(fn)

        def keep_precision(t: Tensor) -> Tensor:
            applied = fn(t)
            return t.to(applied.device) if applied.dtype.itemsize < t.dtype.itemsize else applied

        return super()._apply(keep_precision, recurse=False)


class Router(_Masters):
    """Weights of a softmax router over E experts, fp32 whatever the model's dtype."""

    def __init__(self, features: int, experts: int, device: torch.device, selection_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, features, device=device, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(experts, device=device, dtype=torch.float32))
        self.selection_bias: Tensor | None
        bias = torch.zeros(experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("selection_bias", bias)
        # Small random weights: the logits of normalised activations start near unit scale, and no two experts tie.
        nn.init.normal_(self.weight, std=0.02)

    def weights(self) -> molora_kernels.Router:
        return molora_kernels.Router(self.weight, self.bias, self.selection_bias)


class LoraLinear(_Masters):
    """A frozen linear and its LoRA experts: ``y = x W^T + b + (alpha / r) sum_e g_e B_e A_e dropout(x)``.

    With one expert and no router it is a plain LoRA. Parameters are fp32 masters of any base dtype.

    Attributes:
        base: the frozen ``nn.Linear`` (N, K) that this module replaced; called as it is where it is quantised.
        lora_a: (E * r, K) fp32; expert e owns rows ``e*r : (e+1)*r``.
        lora_b: (N, E * r) fp32, likewise by columns.
        router: the projection's own router, or None.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        group: Group,
        experts: int,
        rank: int,
        alpha: float,
        dropout: float,
        init_b_std: float,
        router: Router | None,
    ) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base
        self.group: Group = group
        self.experts, self.rank, self.dropout = experts, rank, dropout
        self.scaling = alpha / rank
        total = experts * rank
        self.lora_a = nn.Parameter(torch.empty(total, base.in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, total, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        if init_b_std > 0:
            nn.init.normal_(self.lora_b, std=init_b_std)
        self.router = router
        self.shared = SharedInput([self])

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self, x)

    def projection(self) -> molora_kernels.Projection:
        return molora_kernels.Projection(self.base.weight, self.lora_a, self.lora_b, self.base.bias)

    def extra_repr(self) -> str:
        return f"group={self.group}, experts={self.experts}, rank={self.rank}, scaling={self.scaling:g}"


def is_dense(linear: nn.Linear) -> bool:
    """Whether kernels can multiply by the weight as it is; not so where it is quantised, or the class or hooks do
    more."""
    return type(linear).forward is nn.Linear.forward and linear.weight.is_floating_point() and not has_hooks(linear)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what the module's forward is given or gives."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)


class _Waiting(threading.local):
    """What the projections of one input that were not called yet are to give; each thread has its own."""

    def __init__(self) -> None:  # anew in each thread
        self.x: Tensor | None = None
        self.state: tuple[int | None, bool, bool] | None = None
        self.outputs: dict[int, Tensor] | None = None


class SharedInput:
    """Projections of one kind that read one tensor: computed together when the first is called.

    The layer still calls them one by one (``q_proj(x)``, ``k_proj(x)``, …). The first call computes all outputs and
    keeps the rest until they are asked for with the same tensor; any other tensor starts afresh.
    """

    def __init__(self, members: list[LoraLinear]) -> None:
        self.members = members
        self.ledger: routing.Ledger | None = None
        self.rows = slice(0, 0)
        self._waiting = _Waiting()

    def __call__(self, member: LoraLinear, x: Tensor) -> Tensor:
        if len(self.members) == 1:
            return self._compute(x)[0]
        i = next((j for j, m in enumerate(self.members) if m is member), None)
        if i is None:
            raise RuntimeError(
                "this projection is a replica without the ones that share its input, as nn.DataParallel makes them; "
                "use DistributedDataParallel, one process a device"
            )
        # torch.compile traces neither; within one graph the tensor that layers hand on is not changed in place.
        unversioned = torch.compiler.is_compiling() or x.is_inference()
        state = (None if unversioned else x._version, torch.is_grad_enabled(), member.training)
        waiting = self._waiting
        if waiting.x is not x or waiting.state != state or not waiting.outputs or i not in waiting.outputs:
            waiting.x, waiting.state, waiting.outputs = x, state, dict(enumerate(self._compute(x)))
        y = waiting.outputs.pop(i)
        if not waiting.outputs:
            waiting.x = waiting.state = waiting.outputs = None
        return y

    def __getstate__(self) -> dict[str, object]:
        """What copies and pickles keep: not the outputs that wait, which belong to a graph."""
        return {name: value for name, value in self.__dict__.items() if name != "_waiting"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state | {"_waiting": _Waiting()}

    def _compute(self, x: Tensor) -> list[Tensor]:
        first = self.members[0]
        routers = [m.router for m in self.members if m.router is not None]
        if decode.serves(x, first, self.ledger):
            outputs, gates = _few_tokens(x, self.members, routers, self.ledger.top_k if self.ledger else 1)
            routing.write_gates(self.ledger, self.rows, gates)
            return outputs
        gates = routed = None
        if routers:
            assert self.ledger is not None
            record = self.ledger.current
            biases: list[Tensor] = [r.selection_bias for r in routers if r.selection_bias is not None]
            routed = molora_kernels.router(
                x,
                torch.stack([r.weight for r in routers]),
                torch.stack([r.bias for r in routers]),
                top_k=self.ledger.top_k,
                mask=None if record is None else record.mask,
                selection_bias=torch.stack(biases) if biases else None,
            )
            gates = routed.gates
        dropout = first.dropout if first.training else 0.0
        dense = all(is_dense(m.base) for m in self.members)
        outputs = molora_kernels.grouped_lora(
            x,
            [m.base.weight for m in self.members] if dense else [],
            [m.lora_a for m in self.members],
            [m.lora_b for m in self.members],
            scaling=first.scaling,
            gates=gates,
            top_k=None if self.ledger is None else self.ledger.top_k,
            biases=_biases(self.members) if dense else [],
            dropout_p=dropout,
            dropout_seed=molora_kernels.new_dropout_seed(x.device) if dropout else None,
        )
        if not dense:
            outputs = [m.base(x) + added for m, added in zip(self.members, outputs, strict=True)]
        if routed is None or self.ledger is None:
            return list(outputs)
        return [
            routing.collect(self.ledger, self.rows, outputs[0], routed.sums, routed.counts, routed.gates.unbind(-2)),
            *outputs[1:],
        ]


_HOOKED = (
    "a projection of an MLP with one router (moe.router_scope: mlp) has hooks, which would not be called, since the "
    "MLP is computed as one; remove them, put them on the MLP, or give each projection a router of its own "
    "(moe.router_scope and expert_scope: projection)"
)


class LoraMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with LoRA experts on all three projections, run as one kernel call.

    Has the children of the MLP that it replaces, under their own names. ``router`` is set when one router serves the
    block; else each projection has its own.
    """

    def __init__(self, names: tuple[str, str, str], projections: list[LoraLinear], router: Router | None) -> None:
        super().__init__()
        self.names = names
        for name, projection in zip(names, projections, strict=True):
            self.add_module(name, projection)
        self.router = router
        self.ledger: routing.Ledger | None = None
        self.rows = slice(0, 0)

    def projections(self) -> list[LoraLinear]:
        return [self._modules[name] for name in self.names]  # type: ignore[misc] # LoraLinear, by construction

    def routers(self) -> list[Router]:
        if self.router is not None:
            return [self.router]
        return [p.router for p in self.projections() if p.router is not None]

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.projections()
        if any(has_hooks(module) for p in (gate, up, down) for module in (p, p.base)):
            return self._one_by_one(x, gate, up, down)
        if decode.serves(x, gate, self.ledger):
            return self._few_tokens(x, gate, up, down)
        record = None if self.ledger is None else self.ledger.current
        dropout = gate.dropout if self.training else 0.0
        out = molora_kernels.mlp_block(
            x,
            gate.projection(),
            up.projection(),
            down.projection(),
            [router.weights() for router in self.routers()],
            top_k=1 if self.ledger is None else self.ledger.top_k,
            scaling=gate.scaling,
            mask=None if record is None else record.mask,
            dropout_p=dropout,
            dropout_seed=molora_kernels.new_dropout_seed(x.device) if dropout else None,
        )
        if self.ledger is None:
            return out.y
        return routing.collect(self.ledger, self.rows, out.y, out.sums, out.counts, out.gates)

    def _one_by_one(self, x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear) -> Tensor:
        """So that hooks put on a projection, or on the linear in it, since it was patched are called."""
        if self.router is not None:
            raise UserError(_HOOKED)
        return down(functional.silu(gate(x)) * up(x))

    def _few_tokens(self, x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear) -> Tensor:
        routers, top_k = self.routers(), self.ledger.top_k if self.ledger else 1
        (h_gate, h_up), gates = _few_tokens(x, [gate, up], routers[:2], top_k)
        h = functional.silu(h_gate) * h_up
        (y,), of_down = _few_tokens(h, [down], routers[2:], top_k, gates)
        routing.write_gates(self.ledger, self.rows, gates, of_down)  # one router's are there twice, and written once
        return y


class ExpertMLPs(LoraMLP):
    """Experts that are whole MLPs: ``sum_e g_e down_e(silu(gate_e(x)) * up_e(x))``, as in MixLoRA (arXiv 2404.15159).

    Expert e of a projection is the frozen linear with the e-th LoRA. What is frozen is computed once: gate and up for
    all experts, and down, being linear, of the weighted sum of what they activate. The rest is one activation and three
    LoRAs an expert, of all tokens, and recomputed in backward, so that what is saved does not grow with the experts.
    """

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.projections()
        if any(has_hooks(p) for p in (gate, up, down)):
            raise UserError(_HOOKED)
        (router,) = self.routers()
        assert self.ledger is not None
        record = self.ledger.current
        routed = molora_kernels.router(
            x,
            router.weight[None],
            router.bias[None],
            top_k=self.ledger.top_k,
            mask=None if record is None else record.mask,
            selection_bias=None if router.selection_bias is None else router.selection_bias[None],
        )
        drops = self.training and gate.dropout > 0
        seed = molora_kernels.new_dropout_seed(x.device) if drops else None
        frozen = gate.base(x), up.base(x)
        activated: Tensor | int = 0  # summed in fp32: experts that are alike give what one gives, up to one rounding
        added: Tensor | int = 0
        for e, g in enumerate(routed.gates.squeeze(-2).split(1, dim=-1)):
            if torch.is_grad_enabled():
                own = checkpoint(self._expert, e, x, *frozen, g, seed, use_reentrant=False, preserve_rng_state=False)
            else:
                own = self._expert(e, x, *frozen, g, seed)
            activated, added = activated + own[0], added + own[1]
        assert isinstance(activated, Tensor)
        y = down.base(activated.to(x.dtype)) + added
        return routing.collect(self.ledger, self.rows, y, routed.sums, routed.counts, routed.gates.unbind(-2))

    def _expert(
        self, e: int, x: Tensor, h_gate: Tensor, h_up: Tensor, g: Tensor, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What expert e activates, weighed; and what its LoRA on down makes of that."""
        gate, up, down = self.projections()
        of_gate, of_up = self._loras(e, x, [gate, up], seed, stream=2 * e)
        h = functional.silu(h_gate + of_gate) * (h_up + of_up) * g
        return h, self._loras(e, h.to(x.dtype), [down], seed, stream=2 * e + 1)[0]

    def _loras(
        self, e: int, x: Tensor, members: list[LoraLinear], seed: Tensor | None, stream: int
    ) -> tuple[Tensor, ...]:
        """What the e-th LoRA of each member adds."""
        first, own = members[0], slice(e * members[0].rank, (e + 1) * members[0].rank)
        return molora_kernels.grouped_lora(
            x,
            [],
            [m.lora_a[own] for m in members],
            [m.lora_b[:, own] for m in members],
            scaling=first.scaling,
            dropout_p=first.dropout if seed is not None else 0.0,
            dropout_seed=seed,
            stream=stream,
        )


def _few_tokens(
    x: Tensor, projections: list[LoraLinear], routers: list[Router], top_k: int, gates: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Outputs (..., N) of projections that read ``x`` (..., K), and the gates (H, T, E) that weighed their experts:
    those of ``routers``, or if there are none the ``gates`` given."""
    outputs = [p.base(x).contiguous() for p in projections]
    gates = molora_kernels.few_tokens(
        x,
        outputs,
        [p.lora_a for p in projections],
        [p.lora_b for p in projections],
        scaling=projections[0].scaling,
        router_weights=[r.weight for r in routers],
        router_biases=[r.bias for r in routers],
        top_k=top_k,
        gates=None if routers else gates,
    )
    return outputs, gates


def _biases(members: list[LoraLinear]) -> list[Tensor]:
    """The members' biases, with zeros for those that have none; nothing if none has one."""
    if all(m.base.bias is None for m in members):
        return []
    return [m.base.weight.new_zeros(m.base.out_features) if m.base.bias is None else m.base.bias for m in members]
