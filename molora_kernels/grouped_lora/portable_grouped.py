"""The grouped form of routed LoRA experts in plain PyTorch, hand-written backward.

Tokens of one group chose the same experts: these are one LoRA of narrow rank, computed on the rows of the group alone.
Each projection has an order of its own, from its own gates. The mathematics is that of ``portable.py``, and so are the
shape letters; k experts are chosen per token, V visits and C columns of the shrink are those of an order, n rows a
group's. F features are K or N: an adapter is (R, F), A as it is and B transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora_kernels import workspace
from molora_kernels.dropout import Dropout, survivor_scale
from molora_kernels.grouped_lora import portable
from molora_kernels.grouped_lora.order import Order, order_of


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
    """One (T, N) output per projection, and the ungated shrinks (V, C) that backward needs, one projection's after
    another's in memory, as (T, G * k * r)."""
    orders, dropout = orders_of(gates_THE, len(lora_a_RK), top_k), Dropout(dropout_seed, dropout_p, stream)
    s = x_TK.new_empty(len(x_TK), len(lora_a_RK) * top_k * (len(lora_a_RK[0]) // orders[0].total))
    outputs = []
    for g, (order, s_VC) in enumerate(zip(orders, parts(s, orders), strict=True)):
        a_RK, b_RN = adapters(lora_a_RK[g], lora_b_NR[g], x_TK.dtype, dropout_p)
        weight, bias = weights_NK[g] if weights_NK else None, biases_N[g] if biases_N else None
        y = workspace.lasting(x_TK, len(x_TK), b_RN.shape[1])
        with workspace.scope():
            x_VK = sorted_rows(x_TK, order)
            y_VN = workspace.empty(x_TK, len(x_VK), b_RN.shape[1])
            if order.by_set:
                base(x_VK, weight, bias, y_VN)
            else:
                base(x_TK, weight, bias, y)
                y_VN.zero_()
            shrink(dropout.drop_(x_VK, order.tokens), a_RK, order, out=s_VC)
            expand_(y_VN, gated(s_VC, order, scaling), b_RN, order)
            if order.by_set:
                torch.index_select(y_VN, 0, order.positions(), out=y)
            else:
                add_back_(y, y_VN, order)
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
    dropout, orders = Dropout(dropout_seed, dropout_p, stream), orders_of(gates_THE, len(lora_a_RK), top_k)
    ds, db, dgates = to_shrink(dys_TN, lora_b_NR, gates_THE, s, scaling, need_dlora, need_dgates, orders=orders)
    dx, da = x_TK.new_empty(0), x_TK.new_empty(0)
    if need_dx:
        dx = to_input(dys_TN, weights_NK, lora_a_RK, ds, dropout, workspace.lasting(x_TK, *x_TK.shape), orders=orders)
    if need_dlora:
        da = lora_a_RK[0].new_empty(len(lora_a_RK) * len(lora_a_RK[0]), x_TK.shape[1])
        to_adapter(x_TK, ds, dropout, out=list(da.chunk(len(lora_a_RK))), orders=orders)
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
    orders: list[Order],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """ds, laid out as the shrinks are, and db and dgates as in :func:`backward`."""
    assert gates_THE is not None
    ds, db = torch.empty_like(s), []
    dgates = [gates.new_zeros(gates.shape) for gates in gates_THE.unbind(1)] if need_dgates else []
    shrinks = zip(parts(s, orders), parts(ds, orders), strict=True)
    for g, (dy, b, order, (s_VC, ds_VC)) in enumerate(zip(dys_TN, lora_b_NR, orders, shrinks, strict=True)):
        with workspace.scope():
            dy_VN = sorted_rows(dy, order)
            dgated_VC = shrink(dy_VN, b.T.to(s.dtype).contiguous(), order)
            own, gated_VC, own_dgates = gate_backward(dgated_VC, s_VC, order, scaling)
            ds_VC.copy_(own)
            if need_dlora:
                db.append(adapter_grad(dy_VN, gated_VC, order, b.dtype).T.contiguous())
            if need_dgates:
                add_dgates_(dgates[min(g, len(dgates) - 1)], own_dgates, order)
    return ds, db, torch.stack(dgates, dim=1) if need_dgates else s.new_empty(0)


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
    orders: list[Order],
) -> Tensor:
    """dx (T, K) in ``out``: of the frozen weights, the experts and, if given, the routers."""
    out.zero_()
    for g, (dy, a_RK, order, ds_VC) in enumerate(zip(dys_TN, lora_a_RK, orders, parts(ds, orders), strict=True)):
        with workspace.scope():
            own_VK = workspace.empty(out, len(ds_VC), out.shape[1]).zero_()
            expand_(own_VK, ds_VC, portable.joined([a_RK], out.dtype, survivor_scale(dropout.p)), order)
            dropout.drop_(own_VK, order.tokens)
            if weights_NK and order.by_set:
                own_VK.addmm_(sorted_rows(dy, order), weights_NK[g])
            elif weights_NK:
                out.addmm_(dy, weights_NK[g])
            add_back_(out, own_VK, order)
    if dlogits_TE is not None and router_weights_EK is not None:
        out.addmm_(dlogits_TE.to(out.dtype), router_weights_EK.to(out.dtype))
    return out


def to_adapter(
    x_TK: Tensor,
    ds: Tensor,
    dropout: Dropout,
    out: list[Tensor],
    columns_TC: Tensor | None = None,
    *,
    orders: list[Order],
) -> Tensor:
    """da (R, K) of each projection in ``out``. Returns (C, K) in the workspace: the transposed product of x^T with
    ``columns``, which are others'."""
    others_CK = portable.over_rows(x_TK, *(() if columns_TC is None else (columns_TC,)))
    for own, order, ds_VC in zip(out, orders, parts(ds, orders), strict=True):
        with workspace.scope():
            x_VK = dropout.drop_(sorted_rows(x_TK, order), order.tokens)
            own.copy_(adapter_grad(x_VK, ds_VC, order, own.dtype))
        if dropout.p:
            own.mul_(survivor_scale(dropout.p))
    return others_CK


def orders_of(gates_THE: Tensor | None, projections: int, top_k: int) -> list[Order]:
    """The order of each projection; one for all if they share their gates."""
    assert gates_THE is not None, "plain LoRA is dense"
    orders = [order_of(gates, top_k) for gates in gates_THE.unbind(1)]
    return orders if len(orders) > 1 else orders * projections


def parts(s: Tensor, orders: list[Order]) -> list[Tensor]:
    """The shrinks (V, C) of the projections, of all that is saved of them."""
    return list(s.view(len(orders), len(orders[0].tokens), -1))


def adapters(lora_a_RK: Tensor, lora_b_NR: Tensor, dtype: torch.dtype, dropout_p: float) -> tuple[Tensor, Tensor]:
    """A with the scale of dropout's survivors, and B transposed, in the dtype of the products."""
    b_RN = workspace.empty(lora_b_NR, *lora_b_NR.T.shape, dtype=dtype)
    b_RN.T.copy_(lora_b_NR)
    return portable.joined([lora_a_RK], dtype, survivor_scale(dropout_p)), b_RN


def sorted_rows(x_TF: Tensor, order: Order) -> Tensor:
    """(V, F) in the workspace: the row of each visit's token."""
    return torch.index_select(x_TF, 0, order.tokens, out=workspace.empty(x_TF, len(order.tokens), x_TF.shape[1]))


def add_back_(rows_TF: Tensor, rows_VF: Tensor, order: Order) -> None:
    """Adds to each token's row those of its visits; group by group, so that the order of a sum is always the same."""
    for tokens, own in zip(order.tokens.split(order.sizes), _of_groups(rows_VF, order), strict=True):
        rows_TF.index_add_(0, tokens, own)


def base(x: Tensor, weight_NK: Tensor | None, bias_N: Tensor | None, out: Tensor) -> Tensor:
    """The frozen projection; zeros where somebody else computes it."""
    if weight_NK is None:
        return out.zero_()
    if bias_N is None:
        return torch.mm(x, weight_NK.T, out=out)
    return torch.addmm(bias_N, x, weight_NK.T, out=out)


def shrink(rows_VF: Tensor, adapter_RF: Tensor, order: Order, out: Tensor | None = None) -> Tensor:
    """(V, C): each row times those rows of the adapter that are its experts'."""
    columns = order.experts.shape[1] * len(adapter_RF) // order.total
    s_VC = rows_VF.new_empty(len(rows_VF), columns) if out is None else out
    with workspace.scope():
        adapters = of_experts(adapter_RF, order)
        for x, a, s in zip(_of_groups(rows_VF, order), adapters, _of_groups(s_VC, order), strict=True):
            torch.mm(x, a.T, out=s)
    return s_VC


def expand_(rows_VF: Tensor, columns_VC: Tensor, adapter_RF: Tensor, order: Order) -> Tensor:
    """Adds to each row its columns times those rows of the adapter that are its experts'."""
    with workspace.scope():
        adapters = of_experts(adapter_RF, order)
        for y, s, b in zip(_of_groups(rows_VF, order), _of_groups(columns_VC, order), adapters, strict=True):
            y.addmm_(s, b)
    return rows_VF


def adapter_grad(rows_VF: Tensor, columns_VC: Tensor, order: Order, dtype: torch.dtype) -> Tensor:
    """``columns^T rows`` of each group, added to the rows of its experts: (R, F), laid out as the products are."""
    rank = columns_VC.shape[1] // order.experts.shape[1]
    grad_RF = portable.zeros_over_rows(rows_VF, order.total * rank, dtype)
    of_expert = grad_RF.split(rank)
    with workspace.scope():
        products = portable.over_groups(rows_VF, columns_VC, order.sizes)
        for experts, products_CF in zip(order.groups, products, strict=True):
            for expert, part in zip(experts, products_CF.split(rank), strict=True):
                of_expert[expert].add_(part)
    return grad_RF


def of_experts(adapter_RF: Tensor, order: Order) -> list[Tensor]:
    """Of each group, those rows of an adapter that are its experts': (C, F). Of neighbours they are a view."""
    rank = len(adapter_RF) // order.total
    of_expert, found = adapter_RF.split(rank), []
    for experts in order.groups:
        first, last = experts[0], experts[-1]
        if last - first + 1 == len(experts):
            found.append(adapter_RF[first * rank : (last + 1) * rank])
        else:
            room = workspace.empty(adapter_RF, rank * len(experts), adapter_RF.shape[1])
            found.append(torch.cat([of_expert[expert] for expert in experts], out=room))
    return found


def _of_groups(rows: Tensor, order: Order) -> tuple[Tensor, ...]:
    return rows.split(order.sizes)


def gated(s_VC: Tensor, order: Order, scaling: float) -> Tensor:
    """``scaling * gate * s``, multiplied in the gates' precision and rounded once."""
    return portable.gate(s_VC, order.gates[:, None], 1, scaling)


def gate_backward(dgated_VC: Tensor, s_VC: Tensor, order: Order, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """ds and the gated shrink (V, C), and the gradients of the visits' own gates (V, M)."""
    ds, gated_VC, dgates = portable.gate_backward(dgated_VC, s_VC, order.gates[:, None], 1, scaling)
    return ds, gated_VC, dgates[:, 0]


def add_dgates_(dgates_TE: Tensor, own_VM: Tensor, order: Order) -> None:
    """The gradients of the chosen gates; the others' stay as they are."""
    where = order.tokens[:, None] * dgates_TE.shape[1] + order.experts
    dgates_TE.view(-1).index_add_(0, where.view(-1), own_VM.reshape(-1))
