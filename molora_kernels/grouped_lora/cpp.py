"""The grouped form, and plain LoRA, in C++: what the ``inductor`` backend runs on a CPU. The kernels are
``experts.cpp``.

Rows stay where they are: a kernel reads and writes them through the number of their token. Frozen products are
PyTorch's. The mathematics, the layout of what is saved and the shape letters are those of ``portable_grouped.py``, and
of ``portable.py`` where there are no gates. Sums are fp32, whatever the dtype of x.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from molora_kernels import cpp, workspace
from molora_kernels.cpp import DTYPES, address
from molora_kernels.cpu import has_amx
from molora_kernels.dropout import Dropout, survivor_scale
from molora_kernels.grouped_lora import portable
from molora_kernels.grouped_lora.order import MOST_EXPERTS, MOST_SETS, sorted_by_set


def serves(x: Tensor, gates_THE: Tensor | None) -> bool:
    """Whether this module computes a grouped form with these gates, or plain LoRA, of rows like x, under the present
    choice of backend."""
    if x.dtype not in DTYPES or not cpp.compiled(x.device, _functions):
        return False
    if gates_THE is None:  # the library's products are as fast in 16 bits, and faster on matrix units
        return x.dtype == torch.float32 and not has_amx()
    return gates_THE.shape[2] <= MOST_EXPERTS


class Orders(NamedTuple):
    """How tokens are grouped, for each head of the gates; without gates they are not."""

    table: Tensor | None
    """(H, size) int64: what ``order`` of experts.cpp writes."""
    experts: int
    """E; 1 without gates."""
    visits: int
    """V"""
    chosen: int
    """M"""
    most: int
    """Groups that there is room for."""
    once: bool
    """Whether each token is visited once."""


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
    x_TK, tokens, (rank, features) = _rows(x_TK), x_TK.shape[0], lora_a_RK[0].shape
    dropped = Dropout(dropout_seed, dropout_p, stream).dropped(x_TK)
    outputs = []
    for g, b_NR in enumerate(lora_b_NR):
        y = workspace.lasting(x_TK, tokens, b_NR.shape[0])
        if not weights_NK:
            y.zero_()
        elif not biases_N:
            torch.mm(x_TK, weights_NK[g].T, out=y)
        else:
            torch.addmm(biases_N[g], x_TK, weights_NK[g].T, out=y)
        outputs.append(y)
    if gates_THE is not None:
        rank = rank // gates_THE.shape[2] * top_k
    s = x_TK.new_empty(tokens, len(outputs) * rank)
    orders = orders_of(gates_THE, len(outputs), top_k)
    scratch = s.numel() + sum((features + b.shape[0]) * b.shape[1] for b in lora_b_NR)
    _run(
        "forward", orders, gates_THE, s, x=dropped, y=outputs, a=lora_a_RK, b=lora_b_NR, scratch=scratch,
        scaling=scaling, factor=survivor_scale(dropout_p),
    )  # fmt: skip
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
    dropout, projections = Dropout(dropout_seed, dropout_p, stream), len(lora_a_RK)
    orders = orders_of(gates_THE, projections, top_k)
    ds, db, dgates = to_shrink(dys_TN, lora_b_NR, gates_THE, s, scaling, need_dlora, need_dgates, orders=orders)
    dx, da = x_TK.new_empty(0), x_TK.new_empty(0)
    if need_dx:
        dx = to_input(dys_TN, weights_NK, lora_a_RK, ds, dropout, workspace.lasting(x_TK, *x_TK.shape), orders=orders)
    if need_dlora:
        da = lora_a_RK[0].new_empty(projections * lora_a_RK[0].shape[0], x_TK.shape[1])
        to_adapter(x_TK, ds, dropout, list(da.chunk(projections)), orders=orders)
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
    orders: Orders,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """ds (fp32), laid out as the shrinks are, and db and dgates as in :func:`backward`."""
    ds = workspace.empty(s, *s.shape, dtype=torch.float32)
    db = [b.new_empty(b.shape) for b in lora_b_NR] if need_dlora else []
    dgates = None if gates_THE is None or not need_dgates else gates_THE.new_zeros(gates_THE.shape)
    _run(
        "to_shrink", orders, gates_THE, s, ds=ds, y=[_rows(dy) for dy in dys_TN], b=lora_b_NR, db=db, dgates=dgates,
        scaling=scaling, scratch=s.numel(),
    )  # fmt: skip
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
    orders: Orders,
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
    ride = not dropout.p and orders.once  # else a token would get the others' more than once, or dropped
    _run(
        "to_input", orders, None, ds, ds=ds, x=out, a=lora_a_RK, others=others if ride else (),
        factor=survivor_scale(dropout.p),
    )  # fmt: skip
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
    orders: Orders,
) -> Tensor:
    """da (R, K) of each projection in ``out``. Returns (C, K): the transposed product of x^T with ``columns``, which
    are others'."""
    x_TK = _rows(x_TK)
    columns, others = () if columns_TC is None else (columns_TC,), ()
    if dropout.p or not orders.once:  # as in to_input
        others_CK = portable.over_rows(x_TK, *columns)
    else:
        others_CK = x_TK.new_empty(columns[0].shape[1] if columns else 0, x_TK.shape[1], dtype=torch.float32)
        others = (*columns, others_CK) if columns else ()
    _run(
        "to_adapter", orders, None, ds, ds=ds, x=dropout.dropped(x_TK), da=out, others=others,
        factor=survivor_scale(dropout.p),
    )  # fmt: skip
    return others_CK


def orders_of(gates_THE: Tensor | None, projections: int, top_k: int) -> Orders:
    """Of gates (T, H, E); ``projections`` is for whoever needs one order for each."""
    if gates_THE is None:
        return Orders(None, 1, 0, 0, 0, once=True)
    tokens, heads, experts = gates_THE.shape
    by_set = sorted_by_set(experts, top_k)
    visits, chosen, most = (tokens, top_k, MOST_SETS) if by_set else (tokens * top_k, 1, experts)
    table = gates_THE.new_empty(heads, 2 + most + most * chosen + visits, dtype=torch.int64)
    gates = gates_THE.contiguous()
    _functions()["order"](
        gates.data_ptr(), tokens, heads, experts, top_k, by_set, most, table.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return Orders(table, experts, visits, chosen, most, by_set)


# --- the kernels -------------------------------------------------------------------------------------------------


class _Projection(ctypes.Structure):
    """One of those that read the same input: the same fields as in experts.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "da", "db", "y")),
        *((name, ctypes.c_int64) for name in ("ldy", "N")),
    )


class _Call(ctypes.Structure):
    """What is computed, likewise."""

    _fields_ = (
        ("projections", ctypes.POINTER(_Projection)),
        ("G", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("ldx", "T", "K", "E", "r", "H", "M", "V", "most", "order_size")),
        ("order", ctypes.c_void_p),
        ("once", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("gates", "dgates", "scratch", "s", "ds", "others", "of_others")),
        ("Q", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("scaling", "factor")),
        ("threads", ctypes.c_int64),
    )


def _run(
    function: str,
    orders: Orders,
    gates_THE: Tensor | None,
    s: Tensor,
    *,
    ds: Tensor | None = None,
    x: Tensor | None = None,
    y: Sequence[Tensor] = (),
    a: Sequence[Tensor] = (),
    b: Sequence[Tensor] = (),
    da: Sequence[Tensor] = (),
    db: Sequence[Tensor] = (),
    dgates: Tensor | None = None,
    others: Sequence[Tensor] = (),
    scratch: int = 0,
    scaling: float = 1.0,
    factor: float = 1.0,
) -> None:
    """A function of experts.cpp, with what it asks for. ``ds`` is laid out as s; ``scratch``: so many fp32 numbers."""
    with workspace.scope():
        a, b, others = ([_in_fp32(t) for t in given] for given in (a, b, others))  # held until it returns, as is room
        own_da, own_db = ([_own_or_fp32(t) for t in given] for given in (da, db))
        room = workspace.empty(s, scratch, dtype=torch.float32) if scratch else None
        table, gates = orders.table, None if gates_THE is None else gates_THE.contiguous()
        count = max(len(a), len(b), len(da))
        addresses = [[t.data_ptr() for t in given] or [None] * count for given in (a, b, own_da, own_db, y)]
        shapes = [(t.stride(0), t.shape[1]) for t in y] or [(0, 0)] * count
        call = _Call(
            projections=(_Projection * count)(*zip(*addresses, *zip(*shapes, strict=True), strict=True)), G=count,
            T=s.shape[0], E=orders.experts, M=orders.chosen, V=orders.visits, most=orders.most, once=orders.once,
            r=(a[0].shape[0] if a else da[0].shape[0] if da else b[0].shape[1]) // orders.experts, s=s.data_ptr(),
            ds=address(ds), gates=address(gates), dgates=address(dgates), scratch=address(room), scaling=scaling,
            factor=factor, threads=torch.get_num_threads(),
        )  # fmt: skip
        if table is not None:
            (call.H, call.order_size), call.order = table.shape, table.data_ptr()
        if x is not None:
            call.x, call.ldx, call.K = x.data_ptr(), x.stride(0), x.shape[1]
        if others:
            call.others, call.of_others, call.Q = others[0].data_ptr(), others[1].data_ptr(), others[0].shape[1]
        rows = y[0] if x is None else x
        _functions()[f"{function}_{DTYPES[rows.dtype]}"](ctypes.byref(call))
        for own, found in zip((*da, *db), (*own_da, *own_db), strict=True):
            if own is not found:
                own.copy_(found)


def _rows(x: Tensor) -> Tensor:
    """x with features side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _in_fp32(t: Tensor) -> Tensor:
    return workspace.cast(t, torch.float32).contiguous()


def _own_or_fp32(t: Tensor) -> Tensor:
    """Where a gradient is written: itself, or what is rounded to it."""
    if t.dtype == torch.float32 and t.is_contiguous():
        return t
    return workspace.empty(t, *t.shape, dtype=torch.float32)


_SIGNATURES = (
    ("order", "pnnnnbnpi"),
    *(
        (f"{name}_{dtype}", "p")
        for name in ("forward", "to_shrink", "to_input", "to_adapter")
        for dtype in DTYPES.values()
    ),
)


@functools.cache
def _functions() -> cpp.Functions:
    return cpp.functions(Path(__file__).with_name("experts.cpp"), _SIGNATURES)
