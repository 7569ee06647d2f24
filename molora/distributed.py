"""Several processes, one run: started by torchrun, on PyTorch's own collectives.

The processes of a step see other rows and do the same work: sums that decide something (tokens, router sums, gradients)
are added over all of them, so that the step is that of one process with all the rows. ``ddp`` keeps the model whole on
every device; ``fsdp`` spreads base and adapters over all of them (FSDP2) and gathers a layer when it is computed. Why
``ddp`` is an addition of gradients and not PyTorch's wrapper: ``docs/adr/0008-processes.md``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from molora.errors import UserError
from molora.families import family_of

Value = TypeVar("Value")
BUCKET_ELEMENTS = 2**24
"""Gradients are added in buckets of 64 MB, so that the copy that this needs stays small."""
_GONE = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe")
_TALKING = re.compile(rf"gloo|NCCL|[Ss]ocket|{_GONE.pattern}")


@dataclass(frozen=True)
class World:
    """The processes of a run; by default this one alone, for which every method does nothing or returns its input."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Position on this machine."""

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor``, in place, added over all processes; its bits are the same on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients of ``parameters`` over all processes, a bucket at a time."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        gradients = [p.grad for p in parameters if p.grad is not None]
        for i, gradient in enumerate(gradients):
            bucket.append(gradient)
            if i + 1 == len(gradients) or sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS:
                flat = self.sum(torch.cat([g.flatten() for g in bucket]))
                torch._foreach_copy_([g.view(-1) for g in bucket], list(flat.split([g.numel() for g in bucket])))
                bucket = []

    def stack(self, tensor: Tensor) -> Tensor:
        """(size * n,): the (n,) tensors of all processes, in their order."""
        if self.size == 1:
            return tensor
        all_of_them = tensor.new_empty(self.size * len(tensor))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # until torch 2.12
        gather(all_of_them, tensor)
        return all_of_them

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in their order; for plain data, rarely."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, work: Callable[[], Value]) -> Value:
        """What ``work`` returns in the first process, which alone does it."""
        values: list[Any] = [work() if self.first else None]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def together(self, check: Callable[[], Value]) -> Value:
        """What ``check`` returns; an error of any process becomes everyone's, told once. Within, no collectives but
        what every process comes to, in error too."""
        if self.size == 1:
            return check()
        value, error = None, None
        try:
            value = check()
        except UserError as caught:
            error = str(caught)
        found = {message: rank for rank, message in reversed(list(enumerate(self.gather(error)))) if message}
        if found:
            self.end("; ".join(f"rank {rank}: {text}" if rank else text for text, rank in found.items()))
        return value  # type: ignore[return-value] # no error, so it was set

    def require_same(self, what: str, value: Any, mend: str) -> None:
        """An error, told once, where the processes differ in something that all must have alike. Of mappings the first
        keys that differ are named; ``mend`` says how to make them alike."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                where, of_first, of_other = _first_difference(values[0], other)
                where = ".".join([what, *where])
                self.end(f"the processes differ in {where}: {of_first} on rank 0, {of_other} on rank {rank}; {mend}")

    def end(self, why: str) -> NoReturn:
        """End all processes, of which the first says why. It must be out of torchrun's reach when another ends, since
        torchrun then stops those that are left."""
        if self.size > 1:
            _not_to_be_stopped()
            self.gather(None)
        if self.first:
            raise UserError(why)
        raise SystemExit(2)

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """The block runs in one process of each machine first, so that the others find what it left in a cache."""
        if self.size > 1 and self.local_rank:
            dist.barrier()
        try:
            yield
        finally:  # the others are waiting, and may find the same error
            if self.size > 1 and not self.local_rank:
                dist.barrier()


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started, or this one alone.

    Only the first prints to standard output, and warns. Where another process is lost, or talking to it fails, the ones
    that are left end with a :class:`UserError` that keeps the cause and says how to go on.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise UserError(
                f"WORLD_SIZE is {size}, and torchrun did not start this process: each would train by itself, in one "
                "output folder; start the processes with torchrun, or unset WORLD_SIZE for a run of one"
            )
        yield World()
        return
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if world.local_rank < torch.cuda.device_count():  # of a run on CPUs there may be more processes than GPUs
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    signal.signal(signal.SIGTERM, _stopped)
    with contextlib.ExitStack() as stack:
        if not world.first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            transformers_logging.disable_progress_bar()
            logging.getLogger("molora").setLevel(logging.ERROR)  # the first warns
        try:
            yield world
            dist.destroy_process_group()
        except (UserError, _Stopped) as error:
            _not_to_be_stopped()
            raise UserError(str(error) if world.first else f"rank {world.rank}: {error}") from error
        except (dist.DistError, RuntimeError) as error:
            _not_to_be_stopped()
            if not isinstance(error, dist.DistError) and not _TALKING.search(str(error)):
                raise
            gone = _GONE.search(str(error))
            what = "another process of this run is gone" if gone else "communication between the processes failed"
            cause = " ".join(str(error).partition("Exception raised from")[0].split())  # without frames of C++
            raise UserError(
                f"rank {world.rank}: {what} ({cause}); the checkpoints are whole: start all processes again, with "
                "--resume if training had begun"
            ) from error


class _Stopped(BaseException):
    """By torchrun. No ``Exception``, which a compiler at work would take for its own failure, and go on."""


def _stopped(*_: object) -> None:
    raise _Stopped(
        "stopped, because another process failed or was killed; start again, with --resume if training had begun"
    )


def _not_to_be_stopped() -> None:
    """What is left of this process is to say what ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _first_difference(one: Any, other: Any) -> tuple[list[str], Any, Any]:
    """The keys to the first place where nested mappings differ, and what each has there."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [], one, other
    pairs = {key: (one.get(key, "nothing"), other.get(key, "nothing")) for key in one | other}
    key = next(key for key, (of_one, of_other) in pairs.items() if of_one != of_other)
    keys, *found = _first_difference(*pairs[key])
    return [str(key), *keys], found[0], found[1]


# --- sharding ----------------------------------------------------------------------------------------------------


def shard(model: PreTrainedModel, world: World, device: torch.device) -> None:
    """Spread base and adapters of a patched model over the devices of all processes, in place: each decoder layer, the
    embedding and the head are gathered when they are needed. A model that is not on its device yet goes there layer by
    layer, so that no device holds it whole. Gradients are added, not averaged: losses are shares of one mean."""
    mesh = init_device_mesh(device.type, (world.size,))
    layers: Any = model.get_submodule(family_of(model).layers)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for module in (*layers, embedding, *(() if tied else (head,)), model.base_model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if tied:
        head.weight = embedding.weight
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that is here; of one that is not spread, all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tree: Any, world: World) -> Any:
    """``tree`` with every tensor that is spread gathered in the first process's host memory; others, which write
    nothing, get empty ones in their place. All processes must call it."""

    def gathered(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        full = leaf.full_tensor().detach()
        return full.cpu() if world.first else full.new_empty(0)

    return tree_map(gathered, tree)


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor``, whole in every process, spread as ``parameter`` is; a scalar stays as it is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
