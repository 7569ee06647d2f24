"""What a patched model does by itself, so that any trainer can train it: it brings the router losses to the loss that
it returns, and saves its adapter alone.

Two forward hooks do the first. They keep a :class:`~molora.routing.Record` of each forward that is given labels, form
the router losses from it, and return them as Mixtral does: inside ``outputs.loss`` while training, and apart as
``outputs.aux_loss``. The gradient is that of :mod:`molora.routing`, injected in backward; an identity on the outputs,
which backward passes before it reaches any layer, reads how much the trainer weighs the losses (a share of an
accumulated step, a gradient scaler) and makes the record current again for layers that are recomputed.

A loop that keeps its own records (:func:`molora.routing.using`, as ``molora.trainer`` does) is left alone.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from molora import routing
from molora.errors import UserError

if TYPE_CHECKING:
    from molora.patch import State


def attach(model: nn.Module, state: State) -> None:
    """Make ``state`` the model's own, at ``model.molora``, the model bring the losses of its routers, and the input of
    its head contiguous."""
    model.molora = state  # type: ignore[assignment] # a plain attribute, not a submodule
    if (head := getattr(model, "get_output_embeddings", lambda: None)()) is not None:
        state.hooks.append(head.register_forward_pre_hook(_contiguous))
    if state.routers:
        if (backbone := getattr(model, "base_model", model)) is not model:
            state.hooks.append(backbone.register_forward_pre_hook(functools.partial(_forget, state.ledger)))
        state.hooks.append(model.register_forward_pre_hook(_begin, with_kwargs=True))
        state.hooks.append(model.register_forward_hook(_end, with_kwargs=True, always_call=True))
        # How transformers' mixtures announce outputs.aux_loss; TRL's trainers look for these two. The coefficients of
        # the two router losses are in the value already.
        config: Any = model.config
        text_config = config.get_text_config()  # the config itself, where a model does nothing but text
        text_config.output_router_logits, text_config.router_aux_loss_coef = True, 1.0


def _contiguous(_head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For a product with a frozen matrix and a slice of the hidden states, which is what generation asks for after a
    prompt, torch copies the matrix once for each row of the batch, unless the slice is contiguous: in its strides too,
    which of one row and one token count as contiguous whatever they are, and which a view makes anew."""
    return tuple(x.contiguous().view(x.shape) for x in args)


def save_adapter_alone(model: nn.Module) -> None:
    """Make ``model.save_pretrained`` write the adapter."""
    # A bound method would be pickled as an attribute of the model by the function's own name, which is not there.
    model.save_pretrained = functools.partial(_save_pretrained, model)  # type: ignore[assignment] # over a method


def detach(model: nn.Module, state: State) -> None:
    """Undo :func:`attach` and :func:`save_adapter_alone`."""
    while state.hooks:
        state.hooks.pop().remove()
    config: Any = model.config
    for name in ("output_router_logits", "router_aux_loss_coef"):
        config.get_text_config().__dict__.pop(name, None)
    model.__dict__.pop("save_pretrained", None)
    del model.molora


# --- router losses -----------------------------------------------------------------------------------------------


def _forget(ledger: routing.Ledger, *_: Any) -> None:
    """Before a forward of the backbone: drop the record that a backward left behind where it raised, as one without the
    memory for it does. Its mask and its gradient are of another batch."""
    # -1: no backward is running, which would still read it.
    if ledger.current is not None and ledger.current.passed_on and torch._C._current_graph_task_id() == -1:
        ledger.current = None


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ledger = routing.ledger_of(model)
    if ledger.current is not None and not ledger.current.automatic:
        return args, kwargs
    ledger.current = None
    asked = kwargs.get("output_router_logits")
    # By TRL, for outputs.aux_loss; its own head asks by itself where the configuration says so and nobody said no.
    # There are no logits of all routers to return.
    if asked or kwargs.get("fused_lm_head"):
        kwargs = kwargs | {"output_router_logits": False}
    if asked or kwargs.get("labels") is not None or (model.training and torch.is_grad_enabled()):
        given = (kwargs.get("input_ids"), *args[:1], kwargs.get("inputs_embeds"))
        ids = next((x for x in given if x is not None), None)
        if ids is None:  # the model says what it needs
            return args, kwargs
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape[:2]:  # packed rows, or a mask that is made already
            mask = torch.ones(ids.shape[:2], device=ids.device)
        ledger.current = routing.record(model, mask)
        ledger.current.automatic = True
    return args, kwargs


def _end(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    ledger = routing.ledger_of(model)
    record = ledger.current
    if record is None or not record.automatic:
        return None
    ledger.current = None
    if output is None:  # the forward raised
        return None
    losses = routing.combine(model, [record])
    is_tuple = isinstance(output, tuple)
    names = range(len(output)) if is_tuple else list(output.keys())
    graph = [n for n in names if isinstance(output[n], Tensor) and output[n].requires_grad]
    new: dict[Any, Any] = {}
    aux_loss = losses.total
    if graph and torch.is_grad_enabled():
        aux_loss, *passed = _PassOn.apply(model, record, aux_loss, *(output[n] for n in graph))  # type: ignore[misc]
        new = dict(zip(graph, passed, strict=True))
    loss = 0 if is_tuple and kwargs.get("labels") is not None else "loss"
    if loss in new and model.training:
        new[loss] = new[loss] + aux_loss * _share(kwargs)
    if is_tuple:
        return tuple(new.get(n, output[n]) for n in names)
    for name, tensor in new.items():
        output[name] = tensor
    # An attribute and not an item: whoever collects all outputs as logits of the batch must not find it there.
    output.aux_loss = aux_loss
    return output


def _share(kwargs: Mapping[str, Any]) -> Tensor | float:
    """The forward's part of an accumulated step. transformers' Trainer tells models how many labels the whole step has
    and then divides by nothing more."""
    labels, of_step = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if labels is None or of_step is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / of_step


class _PassOn(torch.autograd.Function):
    """Outputs as they are, and the value of the router losses, whose upstream gradient is their weight."""

    @staticmethod
    def forward(ctx: Any, model: nn.Module, record: routing.Record, total: Tensor, *outputs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.model, ctx.record, ctx.unit, ctx.training = model, record, record.gradient.clone(), model.training
        record.passed_on = True
        record.gradient.zero_()  # what does not come through here has no router losses in it
        return total.clone(), *(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, weight: Tensor | None, *d_outputs: Tensor | None) -> Any:
        record = ctx.record
        if weight is None:
            why = "the training loss was not made from outputs.loss and leaves out outputs.aux_loss; add it"
            if not ctx.training:
                why = "the model is in eval mode, where outputs.loss has none of them; call model.train() first"
            warnings.warn(f"the routers of this model train without their losses: {why}", stacklevel=2)
        else:
            record.gradient.copy_(ctx.unit * weight)
        routing.ledger_of(ctx.model).current = record
        Variable._execution_engine.queue_callback(functools.partial(_backward_done, ctx.model, record))
        return None, None, None, *d_outputs


def _backward_done(model: nn.Module, record: routing.Record) -> None:
    ledger = routing.ledger_of(model)
    if ledger.current is record:
        ledger.current = None
    # Nobody says here when the optimizer steps, so loss-free balancing moves with every micro-batch.
    routing.step_bias(model, [record], model.molora.moe)  # type: ignore[union-attr, arg-type] # set by inject


# --- saving ------------------------------------------------------------------------------------------------------


def _save_pretrained(
    self: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **_of_whole_models: Any,
) -> None:
    """Stands in for the method of a patched model, whose parameter names ``from_pretrained`` would not recognise:
    writes what :func:`molora.save_adapter` writes. Options about shards and weights of whole models have no effect."""
    from molora.adapter import save_adapter  # which imports patch, which imports this module

    if push_to_hub:
        raise UserError("save_pretrained(push_to_hub=True) is not available here; use model.push_to_hub(name)")
    if is_main_process:
        save_adapter(self, save_directory, state_dict)
