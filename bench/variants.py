"""The ways to compute the SwiGLU block with experts: molora's, and those that people write. Peers: ``peers.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import molora_kernels as mk
from bench.measure import Variant
from bench.problem import Problem, Shape
from molora_kernels.grouped_lora.dispatch import Form

Project = Callable[[Tensor, mk.Projection, mk.Router | None], Tensor]
Build = Callable[[Problem, Shape], Variant]


# --- the frozen block --------------------------------------------------------------------------------------------


def frozen(p: Problem, shape: Shape) -> Variant:
    """The block with frozen weights and a gradient to its input: what a step costs without adapters."""
    gate, up, down = p.weights()
    return Variant(lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), [], lambda _: {})


def unpatched(p: Problem, shape: Shape) -> Variant:
    """The module of transformers, frozen."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(
        hidden_size=p.x.shape[1],
        intermediate_size=len(p.weights()[0]),
        num_attention_heads=1,  # a block has none, but a configuration's must divide its hidden size
        num_key_value_heads=1,
    )
    with torch.device("meta"):
        mlp = LlamaMLP(config)
    mlp.load_state_dict(frozen_mlp(p).state_dict(), assign=True)
    return Variant(mlp.requires_grad_(False), [], lambda _: {})


class Mlp(nn.Module):
    """The frozen block as modules, for peers that put theirs around a linear."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def frozen_mlp(p: Problem) -> Mlp:
    return Mlp(p.weights())


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


# --- routed experts, a router per projection ---------------------------------------------------------------------


def molora(p: Problem, shape: Shape) -> Variant:
    """``mlp_block`` on the backend that its device has, in the form that the dispatch rule chooses."""
    gate, up, down = p.projections

    def forward(x: Tensor) -> Tensor:
        seed = mk.new_dropout_seed(x.device) if shape.dropout else None
        return mk.mlp_block(
            x, gate, up, down, p.routers, top_k=shape.top_k, scaling=p.scaling,
            dropout_p=shape.dropout, dropout_seed=seed,
        ).y  # fmt: skip

    return Variant(forward, p.leaves(), p.named)


def molora_in_form(form: Form) -> Build:
    """The same in a given form: ``dense`` computes all experts, ``grouped`` the chosen ones, on sorted tokens."""

    def build(p: Problem, shape: Shape) -> Variant:
        plain = molora(p, shape)

        def forward(x: Tensor) -> Tensor:
            with mk.use_form(form):
                return plain.forward(x)

        return Variant(forward, plain.leaves, plain.named)

    return build


def reference(p: Problem, shape: Shape) -> Variant:
    """The definition, for fp64."""
    plain = molora(p, shape)

    def forward(x: Tensor) -> Tensor:
        with mk.use_backend("reference"):
            return plain.forward(x)

    return Variant(forward, plain.leaves, plain.named)


def block(p: Problem, project: Project) -> Callable[[Tensor], Tensor]:
    gate, up, down = p.projections
    gate_router, up_router, down_router = p.routers or (None, None, None)

    def forward(x: Tensor) -> Tensor:
        h = F.silu(project(x, gate, gate_router)) * project(x, up, up_router)
        return project(h, down, down_router)

    return forward


def choose(x: Tensor, router: mk.Router, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates and indices (T, k) of the chosen experts, as a mixture-of-experts layer in eager PyTorch computes them."""
    probs = torch.softmax(F.linear(x.to(router.weight.dtype), router.weight, router.bias), dim=-1)
    best = probs.topk(top_k, dim=-1)
    # One expert keeps its probability: renormalised it would be 1, and its router untrainable.
    return best.values if top_k == 1 else best.values / best.values.sum(-1, keepdim=True), best.indices


def dense_gates(x: Tensor, router: mk.Router | None, top_k: int) -> Tensor:
    """(T, E), zero where an expert is not chosen."""
    assert router is not None
    gates, indices = choose(x, router, top_k)
    zeros = torch.zeros(len(x), len(router.weight), dtype=gates.dtype, device=x.device)
    return zeros.scatter(1, indices, gates)


def expert(q: mk.Projection, e: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of expert e."""
    part = slice(e * rank, (e + 1) * rank)
    return q.lora_a[part].to(dtype), q.lora_b[:, part].to(dtype)


def naive(p: Problem, shape: Shape) -> Variant:
    """The loop that people write: every expert on every token, weighted by its gate."""

    def project(x: Tensor, q: mk.Projection, router: mk.Router | None) -> Tensor:
        weights = dense_gates(x, router, shape.top_k).to(x.dtype)
        dropped = F.dropout(x, shape.dropout)
        y = F.linear(x, q.weight)
        for e in range(shape.experts):
            a, b = expert(q, e, shape.rank, x.dtype)
            y = y + p.scaling * F.linear(F.linear(dropped, a), b) * weights[:, e : e + 1]
        return y

    return Variant(block(p, project), p.leaves(), p.named)


def selecting(p: Problem, shape: Shape) -> Variant:
    """The loop with ``index_select``: each expert on its own tokens, results added back in place."""

    def project(x: Tensor, q: mk.Projection, router: mk.Router | None) -> Tensor:
        assert router is not None
        gates, indices = choose(x, router, shape.top_k)
        dropped = F.dropout(x, shape.dropout)
        y = F.linear(x, q.weight)
        for e in range(shape.experts):
            token, slot = (indices == e).nonzero(as_tuple=True)
            a, b = expert(q, e, shape.rank, x.dtype)
            out = F.linear(F.linear(dropped.index_select(0, token), a), b)
            y = y.index_add(0, token, out * (p.scaling * gates[token, slot, None]).to(x.dtype))
        return y

    return Variant(block(p, project), p.leaves(), p.named)


def dense_eager(p: Problem, shape: Shape) -> Variant:
    """molora's dense algorithm, experts concatenated and gates as a mask, left to autograd."""

    def project(x: Tensor, q: mk.Projection, router: mk.Router | None) -> Tensor:
        weights = (p.scaling * dense_gates(x, router, shape.top_k)).to(x.dtype)
        s = F.linear(F.dropout(x, shape.dropout), q.lora_a.to(x.dtype))
        s = s * weights.repeat_interleave(shape.rank, dim=1)
        return F.linear(x, q.weight) + F.linear(s, q.lora_b.to(x.dtype))

    return Variant(block(p, project), p.leaves(), p.named)


def compiled(p: Problem, shape: Shape) -> Variant:
    """The dense form through ``torch.compile``."""
    eager = dense_eager(p, shape)
    return Variant(torch.compile(eager.forward), eager.leaves, eager.named)


# --- other mathematics: what some peers compute, in eager PyTorch, to hold them to ------------------------------


def gated_blocks(p: Problem, shape: Shape) -> Variant:
    """MixLoRA's block (arXiv 2404.15159): one router; each expert is a whole block of its own A and B on all three
    projections, and the gates weight the blocks' outputs."""
    gate, up, down = p.projections
    router = mk.Router(p.routers[0].weight)

    def forward(x: Tensor) -> Tensor:
        weights = dense_gates(x, router, shape.top_k).to(x.dtype)
        y = torch.zeros_like(x)
        for e in range(shape.experts):

            def project(t: Tensor, q: mk.Projection, e: int = e) -> Tensor:
                a, b = expert(q, e, shape.rank, t.dtype)
                return F.linear(t, q.weight) + p.scaling * F.linear(F.linear(t, a), b)

            y = y + weights[:, e : e + 1] * project(F.silu(project(x, gate)) * project(x, up), down)
        return y

    experts = p.leaves()[:6]
    return Variant(forward, [*experts, router.weight], lambda g: {"dA": g[0:6:2], "dB": g[1:6:2], "d router": g[6:]})


def single(p: Problem, shape: Shape) -> Variant:
    """One plain LoRA on each projection (arXiv 2106.09685); p is a :meth:`Problem.single`."""

    def project(x: Tensor, q: mk.Projection, _: mk.Router | None) -> Tensor:
        return F.linear(x, q.weight) + p.scaling * F.linear(F.linear(x, q.lora_a.to(x.dtype)), q.lora_b.to(x.dtype))

    return Variant(block(p, project), p.leaves(), lambda g: {"dA": g[0::2], "dB": g[1::2]})
