"""The grouped form, and plain LoRA, in C++: what the ``inductor`` backend runs on a CPU. The kernels are
``experts.cpp``.

Rows stay where they are: a kernel reads and writes them through the number of their token. Frozen products are
PyTorch's. The mathematics, the layout of what is saved and the shape letters are those of ``portable_grouped.py``, and
of ``portable.py`` where there are no gates. Adapters are multiplied in fp32, whatever the dtype of x.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from molora_kernels import cpp, workspace
from molora_kernels.cpp import address
from molora_kernels.cpu import has_amx
from molora_kernels.dropout import Dropout, survivor_scale
from molora_kernels.grouped_lora import portable
from molora_kernels.grouped_lora.order import MOST_SETS, sorted_by_set

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MOST_EXPERTS = 64
"""A set of them is the bits of one number."""


def serves(x: Tensor, gates_THE: Tensor | None) -> bool:
    """Whether this module computes a grouped form with these gates, or plain LoRA, of rows like x, under the present
    choice of backend."""
    if x.dtype not in DTYPES or not cpp.compiled(x.device, _functions):
        return False
    if gates_THE is None:  # matrix units multiply faster, and 16-bit products do
        return x.dtype == torch.float32 and not has_amx()
    return gates_THE.shape[2] <= MOST_EXPERTS


class Groups(NamedTuple):
    """Visits of tokens, as in ``order.Order``."""

    tokens: Tensor
    """(V,) int64"""
    starts: Tensor
    """(groups + 1,) int64 and more"""
    experts: Tensor
    """(groups, M) int64 and more"""
    groups: int
    chosen: int
    """M"""
    once: bool
    """Whether each token is visited once."""
    routed: bool = True
    """Whether there are gates."""

    def arguments(self) -> tuple[int, ...]:
        return self.tokens.data_ptr(), self.starts.data_ptr(), self.experts.data_ptr(), self.groups, self.chosen


@workspace.scope()
def forward(
    x_TK: Tensor,
    weights_NK: list[Tensor],
    biases_N: list[Tensor],
    lora_a_RK: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    top_k: int,
) -> tuple[list[Tensor], Tensor]:
    """One (T, N) output per projection, and the ungated shrinks that backward needs."""
    x_TK, products = _rows(x_TK), len(lora_a_RK)
    dropped = Dropout(dropout_seed, dropout_p, stream).dropped(x_TK)
    orders = _orders(gates_THE, products, top_k, len(x_TK))
    s = x_TK.new_empty(len(x_TK), products * _columns(lora_a_RK[0], gates_THE, top_k))
    outputs, gated = [], []
    for g, (order, a_RK, s_VC) in enumerate(_of_input(lora_a_RK, dropout_p, s, orders)):
        gated.append(shrink(dropped, a_RK, order, _head(gates_THE, g), scaling, s_VC))
    if gates_THE is None:
        gated = gated[0].chunk(products, dim=1)
    for g, (order, gated_VC, b) in enumerate(zip(orders, gated, lora_b_NR, strict=True)):
        y = workspace.lasting(x_TK, len(x_TK), len(b))
        if not weights_NK:
            y.zero_()
        elif not biases_N:
            torch.mm(x_TK, weights_NK[g].T, out=y)
        else:
            torch.addmm(biases_N[g], x_TK, weights_NK[g].T, out=y)
        expand_(y, gated_VC, _in_fp32(b), order, across=False)
        outputs.append(y)
    return outputs, s


@workspace.scope()
def backward(
    dys_TN: list[Tensor],
    x_TK: Tensor,
    weights_NK: list[Tensor],
    lora_a_RK: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    s: Tensor,
    dropout_seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    stream: int,
    need_dx: bool,
    need_dlora: bool,
    need_dgates: bool,
    top_k: int,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """dx (T, K), da (G * R, K), db (N, R) per projection, dgates (T, H, E); what is not needed has zero elements."""
    dropout = Dropout(dropout_seed, dropout_p, stream)
    orders = _orders(gates_THE, len(lora_a_RK), top_k, len(x_TK))
    ds, db, dgates = to_shrink(dys_TN, lora_b_NR, gates_THE, s, scaling, need_dlora, need_dgates, orders=orders)
    dx, da = x_TK.new_empty(0), x_TK.new_empty(0)
    if need_dx:
        dx = to_input(dys_TN, weights_NK, lora_a_RK, ds, dropout, workspace.lasting(x_TK, *x_TK.shape), orders=orders)
    if need_dlora:
        da = lora_a_RK[0].new_empty(len(lora_a_RK) * len(lora_a_RK[0]), x_TK.shape[1])
        out = [da] if gates_THE is None else list(da.chunk(len(lora_a_RK)))  # together, as in _of_input
        to_adapter(x_TK, ds, dropout, out, orders=orders[: len(out)])
    return dx, da, db, dgates


def to_shrink(
    dys_TN: list[Tensor],
    lora_b_NR: list[Tensor],
    gates_THE: Tensor | None,
    s: Tensor,
    scaling: float,
    need_dlora: bool,
    need_dgates: bool,
    *,
    orders: list[Groups],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """ds (fp32), laid out as the shrinks are, and db and dgates as in :func:`backward`."""
    ds, db = workspace.empty(s, *s.shape, dtype=torch.float32), []
    dgates = None if gates_THE is None or not need_dgates else gates_THE.new_zeros(gates_THE.shape)
    shrinks = zip(parts(s, orders), parts(ds, orders), strict=True)
    for g, (dy, b, order, (s_VC, ds_VC)) in enumerate(zip(dys_TN, lora_b_NR, orders, shrinks, strict=True)):
        with workspace.scope():
            dy = _rows(dy)
            of_gates = _head(gates_THE, g), scaling, s_VC, ds_VC, _head(dgates, g)
            gated = unexpand(dy, _in_fp32(b), order, *of_gates)
            if need_dlora:
                db.append(grad(dy, gated, b.new_empty(b.shape), order, across=True))
    return ds, db, s.new_empty(0) if dgates is None else dgates


def to_input(
    dys_TN: list[Tensor],
    weights_NK: list[Tensor],
    lora_a_RK: list[Tensor],
    ds: Tensor,
    dropout: Dropout,
    out: Tensor,
    dlogits_TE: Tensor | None = None,
    router_weights_EK: Tensor | None = None,
    *,
    orders: list[Groups],
) -> Tensor:
    """dx (T, K) in ``out``: of the frozen weights, the experts and, if given, the routers."""
    others = () if dlogits_TE is None or router_weights_EK is None else (dlogits_TE, router_weights_EK)
    terms = list(zip(dys_TN, weights_NK, strict=True)) if weights_NK else []
    if dropout.p or not terms:
        out.zero_()
    else:  # experts add to it, where it lies
        torch.mm(*terms.pop(0), out=out)
        for dy, weight in terms:
            out.addmm_(dy, weight)
        terms.clear()
    ride = not dropout.p and orders[0].once  # else a token would get the others' more than once, or dropped
    for i, (order, a_RK, ds_VC) in enumerate(_of_input(lora_a_RK, dropout.p, ds, orders)):
        expand_(out, ds_VC, a_RK, order, *(others if ride and i == 0 else ()))
    dropout.drop_(out)
    for dy, weight in terms:
        out.addmm_(dy, weight)
    if others and not ride:
        out.addmm_(others[0].to(out.dtype), others[1].to(out.dtype))
    return out


def to_adapter(
    x_TK: Tensor,
    ds: Tensor,
    dropout: Dropout,
    out: list[Tensor],
    columns_TC: Tensor | None = None,
    *,
    orders: list[Groups],
) -> Tensor:
    """da (R, K) of each projection in ``out``. Returns (C, K): the transposed product of x^T with ``columns``, which
    are others'."""
    x_TK = _rows(x_TK)
    dropped, ride = dropout.dropped(x_TK), not dropout.p and orders[0].once
    others_CK = x_TK.new_empty(0, x_TK.shape[1])
    if not ride:
        others_CK = portable.over_rows(x_TK, *(() if columns_TC is None else (columns_TC,)))
    for i, (own, order, ds_VC) in enumerate(zip(out, orders, parts(ds, orders), strict=True)):
        others = None
        if columns_TC is not None and ride and i == 0:
            others = _in_fp32(columns_TC)
            others_CK = x_TK.new_empty(others.shape[1], x_TK.shape[1], dtype=torch.float32)
        grad(dropped, ds_VC, own, order, others, others_CK, factor=survivor_scale(dropout.p))
    return others_CK


# --- the kernels -------------------------------------------------------------------------------------------------


def shrink(x_TF: Tensor, w_RF: Tensor, order: Groups, gates_TE: Tensor | None, scaling: float, s_VC: Tensor) -> Tensor:
    """x times each visit's experts, in ``s``, and (V, C) fp32 in the workspace: that times ``scaling * gate``."""
    gated = workspace.empty(s_VC, *s_VC.shape, dtype=torch.float32)
    _shrink(x_TF, w_RF, True, order, gates_TE, scaling, s_VC, None, gated, None)
    return gated


def unexpand(
    dy_TF: Tensor,
    w_FR: Tensor,
    order: Groups,
    gates_TE: Tensor | None,
    scaling: float,
    s_VC: Tensor,
    ds_VC: Tensor,
    dgates_TE: Tensor | None,
) -> Tensor:
    """The gradient of s in ``ds``, and the gated s again, as :func:`shrink` gives it; those of the chosen gates are
    added to ``dgates``."""
    gated = workspace.empty(s_VC, *s_VC.shape, dtype=torch.float32)
    _shrink(dy_TF, w_FR, False, order, gates_TE, scaling, s_VC, ds_VC, gated, dgates_TE)
    return gated


def _shrink(
    x_TF: Tensor,
    w: Tensor,
    across: bool,
    order: Groups,
    gates_TE: Tensor | None,
    scaling: float,
    s_VC: Tensor,
    ds_VC: Tensor | None,
    gated_VC: Tensor,
    dgates_TE: Tensor | None,
) -> None:
    with workspace.scope():
        F, R = w.shape[::-1] if across else w.shape
        room = workspace.empty(w, F, R) if across else None
        _functions()[f"shrink_{DTYPES[x_TF.dtype]}"](
            x_TF.data_ptr(), x_TF.stride(0), w.data_ptr(), across, F, R,
            s_VC.shape[1] // order.chosen, *order.arguments(), address(gates_TE),
            0 if gates_TE is None else gates_TE.stride(0), scaling, ds_VC is not None,
            s_VC.data_ptr(), address(ds_VC), s_VC.stride(0), gated_VC.data_ptr(), address(dgates_TE),
            address(room), torch.get_num_threads(),
        )  # fmt: skip


def expand_(
    y_TF: Tensor,
    columns_VC: Tensor,
    w: Tensor,
    order: Groups,
    others_TQ: Tensor | None = None,
    w_others_QF: Tensor | None = None,
    *,
    across: bool = True,
) -> None:
    """Adds to each visit's row its columns (fp32) times those rows of ``w`` (R, F) that are its experts', or columns if
    it is not ``across``, (F, R); and what others, one row a token, make of theirs."""
    with workspace.scope():
        others = None if others_TQ is None else _in_fp32(others_TQ)
        w_others = None if w_others_QF is None else _in_fp32(w_others_QF)
        F, R = w.shape[::-1] if across else w.shape
        room = None if across else workspace.empty(w, R, F)
        _functions()[f"expand_{DTYPES[y_TF.dtype]}"](
            y_TF.data_ptr(), y_TF.stride(0), columns_VC.data_ptr(), columns_VC.stride(0), w.data_ptr(), across, F, R,
            columns_VC.shape[1] // order.chosen, *order.arguments(), order.once, address(others), address(w_others),
            0 if others is None else others.shape[1], address(room), torch.get_num_threads(),
        )  # fmt: skip


def grad(
    x_TF: Tensor,
    columns_VC: Tensor,
    out: Tensor,
    order: Groups,
    others_TQ: Tensor | None = None,
    others_QF: Tensor | None = None,
    *,
    factor: float = 1.0,
    across: bool = False,
) -> Tensor:
    """``factor * columns^T x`` of each visit (fp32), added up for its experts in ``out``, (R, F) or ``across`` (F, R).
    That of ``others_TQ`` (fp32, one row a token) in ``others_QF``."""
    d = out if out.dtype == torch.float32 and out.is_contiguous() else out.new_empty(out.shape, dtype=torch.float32)
    F, R = d.shape if across else d.shape[::-1]
    _functions()[f"grad_{DTYPES[x_TF.dtype]}"](
        x_TF.data_ptr(), x_TF.stride(0), columns_VC.data_ptr(), columns_VC.stride(0), F, R,
        columns_VC.shape[1] // order.chosen, *order.arguments(), factor, across, d.data_ptr(),
        address(others_TQ), None if others_TQ is None else address(others_QF),
        0 if others_TQ is None else others_TQ.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return out if d is out else out.copy_(d)


def _orders(gates_THE: Tensor | None, projections: int, top_k: int, tokens: int) -> list[Groups]:
    return [_everyone(tokens)] * projections if gates_THE is None else orders_of(gates_THE, projections, top_k)


def orders_of(gates_THE: Tensor, projections: int, top_k: int) -> list[Groups]:
    """The order of each projection; one for all if they share their gates."""
    orders = [_order_of(_rows(gates), top_k) for gates in gates_THE.unbind(1)]
    return orders if len(orders) > 1 else orders * projections


def _order_of(gates_TE: Tensor, top_k: int) -> Groups:
    tokens, experts = gates_TE.shape
    once = sorted_by_set(experts, top_k)
    chosen, most = (top_k, MOST_SETS) if once else (1, experts)
    shapes = (tokens * (1 if once else top_k),), (most + 1,), (most, chosen)
    visits, starts, of_groups = (gates_TE.new_empty(shape, dtype=torch.int64) for shape in shapes)
    groups = _functions()["order"](
        gates_TE.data_ptr(), gates_TE.stride(0), tokens, experts, top_k, MOST_SETS if once else 0,
        visits.data_ptr(), starts.data_ptr(), of_groups.data_ptr(),
    )  # fmt: skip
    return Groups(visits, starts, of_groups, groups, chosen, once)


@functools.lru_cache(maxsize=16)
def _everyone(tokens: int) -> Groups:
    """One group with one expert."""
    visits, starts, experts = (torch.tensor(of, device="cpu") for of in (range(tokens), [0, tokens], [[0]]))
    return Groups(visits, starts, experts, 1, 1, once=True, routed=False)


def parts(s: Tensor, orders: list[Groups]) -> list[Tensor]:
    """The shrinks (V, C) of the projections, of all that is saved of them: one after another, or side by side where
    there are no gates."""
    if orders[0].routed:
        return list(s.view(len(orders), len(orders[0].tokens), -1))
    return list(s.chunk(len(orders), dim=1))


def _columns(lora_a_RK: Tensor, gates_THE: Tensor | None, top_k: int) -> int:
    """Of all visits of a token."""
    return len(lora_a_RK) if gates_THE is None else len(lora_a_RK) // gates_THE.shape[2] * top_k


def _head(gates_THE: Tensor | None, g: int) -> Tensor | None:
    """(T, E) of projection g, experts side by side."""
    return None if gates_THE is None else _rows(gates_THE[:, min(g, gates_THE.shape[1] - 1)])


def _rows(x: Tensor) -> Tensor:
    """x with features side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _in_fp32(x: Tensor) -> Tensor:
    return workspace.cast(x, torch.float32).contiguous()


def _of_input(
    lora_a_RK: list[Tensor], dropout_p: float, s: Tensor, orders: list[Groups]
) -> Iterator[tuple[Groups, Tensor, Tensor]]:
    """Order, A (fp32, times what dropout's survivors are multiplied by) and columns of each projection; of all together
    where there are no gates, since then they are one LoRA as far as their input goes."""
    together = [lora_a_RK] if not orders[0].routed else [[a] for a in lora_a_RK]
    for order, adapters, s_VC in zip(orders, together, parts(s, orders[: len(together)]), strict=False):
        yield order, portable.joined(adapters, torch.float32, survivor_scale(dropout_p)).contiguous(), s_VC


_GROUPS = "pppnn"
_SIGNATURES = (
    ("order", "pnnnnnppp>n"),
    *((f"shrink_{name}", f"pnpbnnn{_GROUPS}pnfbppnpppi") for name in DTYPES.values()),
    *((f"expand_{name}", f"pnpnpbnnn{_GROUPS}bppnpi") for name in DTYPES.values()),
    *((f"grad_{name}", f"pnpnnnn{_GROUPS}fbpppni") for name in DTYPES.values()),
)


@functools.cache
def _functions() -> cpp.Functions:
    return cpp.functions(Path(__file__).with_name("experts.cpp"), _SIGNATURES)
