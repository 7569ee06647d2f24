"""Forward of the SwiGLU block on the GPU: route+shrink for gate and up, SwiGLU, route+shrink for down.

Shape letters: T tokens, K hidden features, I intermediate features, H routers, E experts, P = G * R columns of the
shrink of G projections.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton types a launch as a plain call of the kernel: it knows neither num_warps nor that constexpr takes an int.)
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels._triton.cases import DTYPES, Case, short
from molora_kernels._triton.tiles import Capability, Tiles, cdiv, launching_on
from molora_kernels._triton.total import AS_PLANES, Kind, joined
from molora_kernels.grouped_lora import forward as grouped_lora
from molora_kernels.grouped_lora import grouped, tiles
from molora_kernels.mlp_block import portable
from molora_kernels.router import forward as router

IN, DOWN = slice(0, 2), slice(2, 3)
"""Of the projections, and of their routers: those that read x, and the one that reads what they activate."""
BLOCK = 1024
"""Elements of one program of an elementwise kernel."""
TILES = Tiles(block_t=0, block_k=BLOCK)


@triton.jit
def swiglu_fwd_kernel(p_gate, p_up, p_h, n, BLOCK: tl.constexpr):
    """h = silu(gate) * up, elementwise over n."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_gate = tl.load(p_gate + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_h + o_n, (b_gate * tl.sigmoid(b_gate) * b_up).to(p_h.dtype.element_ty), mask=m_n)


def forward(
    x_TK: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    router_weights: list[Tensor],
    router_biases: list[Tensor],
    selection_biases: list[Tensor],
    mask_T: Tensor | None,
    dropout_seed: Tensor | None,
    top_k: int,
    scaling: float,
    dropout_p: float,
    form: str = "dense",
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """y, or h in the dense form, for :func:`down`; sums, counts, and what backward needs: [h_gate, h_up, s_in, s_down,
    gates_in, logits_in, gates_down, logits_down], of which gates and logits are empty where there is no such router."""
    if x_TK.dtype == torch.float64:  # tensor cores stop at fp32; fp64 is for checking gradients
        return portable.forward(
            x_TK, weights, biases, lora_a, lora_b, router_weights, router_biases, selection_biases, mask_T,
            dropout_seed, top_k, scaling, dropout_p, form,
        )  # fmt: skip

    def rides_along(part: slice) -> bool:
        if form != "dense" or not router_weights[part]:
            return False
        heads, experts = tiles.padded_experts(len(router_weights[part]), len(router_weights[0]))
        return tiles.rides_along(sum(map(len, lora_a[part])), heads * experts, x_TK.dtype)

    def route(x: Tensor, part: slice, stream: int) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The shrink in the dense form; gates and logits of the part's own routers, if there are any."""
        a, drop = a_in if stream == 0 else a_down, (dropout_seed, dropout_p, stream)
        s, own = None, ()
        if router_weights[part]:
            heads, experts = len(router_weights[part]), len(router_weights[0])
            weight = next(of_routers)
            bias, selection = (next(of_routers) if given else None for given in (router_biases, selection_biases))
            if rides_along(part):
                own_routers = grouped_lora.Routers(weight, bias, selection, mask, top_k)
                s, (*own, of_blocks) = grouped_lora.route_and_shrink(x, a, own_routers, heads, experts, *drop)
            else:
                *own, of_blocks = router.route(x, weight.view(heads, experts, -1), bias, selection, mask, top_k)
            partials.append(of_blocks)
        return grouped_lora.shrink(x, a, *drop) if form == "dense" and s is None else s, own

    def by_set(
        x: Tensor, part: slice, stream: int, a: list[Tensor], gates: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        lists = (weights[part], biases[part], a, b[part])
        return grouped.forward(x, *lists, gates, dropout_seed, scaling, dropout_p, stream, top_k)

    x_TK, mask = grouped_lora.rows_contiguous(x_TK), router.flags(mask_T)
    groups = [lora_a[IN], lora_a[DOWN], *([b] for b in (lora_b if form == "grouped" else lora_b[IN]))]
    kinds: list[Kind] = [x_TK.dtype for _ in groups]
    adapters = len(groups)
    for part in (IN, DOWN):
        if router_weights[part]:
            groups += [given[part] for given in (router_weights, router_biases, selection_biases) if given]
            kinds.append(AS_PLANES if rides_along(part) else torch.float32)
            kinds += [torch.float32] * (len(groups) - len(kinds))
    made = joined(groups, kinds)
    (a_in, a_down, *b), of_routers = made[:adapters], iter(made[adapters:])
    partials: list[Tensor] = []

    s_in, own_in = route(x_TK, IN, 0)
    gates_in = own_in[0] if own_in else None
    if s_in is None:
        (h_gate, h_up), s_in = by_set(x_TK, IN, 0, list(a_in.chunk(2)), gates_in)
    else:
        h_gate, h_up = grouped_lora.expand(x_TK, weights[IN], biases[IN], b, s_in, gates_in, scaling)
    found = swiglu(h_gate, h_up)
    s_down, own_down = route(found, DOWN, 1)
    if s_down is None:
        (found,), s_down = by_set(found, DOWN, 1, [a_down], own_down[0] if own_down else gates_in)
    routed = [t for own in (own_in, own_down) for t in own or (x_TK.new_empty(0), x_TK.new_empty(0))]
    sums, counts = router.add_up(partials) if partials else portable.no_routing(x_TK)
    return found, sums, counts, [h_gate, h_up, s_in, s_down, *routed]


def down(
    h_TI: Tensor,
    s_TR: Tensor,
    gates_THE: Tensor | None,
    weight_KI: Tensor,
    bias_K: Tensor | None,
    lora_b_KR: Tensor,
    scaling: float,
) -> Tensor:
    """y of the dense form."""
    if h_TI.dtype == torch.float64:  # as in forward
        return portable.down(h_TI, s_TR, gates_THE, weight_KI, bias_K, lora_b_KR, scaling)
    biases = [] if bias_K is None else [bias_K]
    b = joined([[lora_b_KR]], [h_TI.dtype])
    return grouped_lora.expand(h_TI, [weight_KI], biases, b, s_TR, gates_THE, scaling)[0]


def swiglu(h_gate_TI: Tensor, h_up_TI: Tensor) -> Tensor:
    """silu(h_gate) * h_up, rounded once."""
    h, n = torch.empty_like(h_gate_TI), h_gate_TI.numel()
    if n:
        with launching_on(h.device):
            swiglu_fwd_kernel[(cdiv(n, BLOCK),)](h_gate_TI, h_up_TI, h, n, BLOCK=BLOCK, num_warps=TILES.num_warps)
    return h


def compile_cases(_: Capability) -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case(
            kernel=swiglu_fwd_kernel,
            label=short(dtype),
            pointers=dict.fromkeys(("p_gate", "p_up", "p_h"), dtype),
            scalars={"n": 8192 * 8192},
            constants={"BLOCK": BLOCK},
            tiles=TILES,
            tensor_cores=False,
        )
