"""Several runs in the processes that torchrun started, one after the other: starting takes longer than all of them.

    torchrun --nproc-per-node 2 -m tests.molora.distributed_runs FOLDER

``FOLDER/runs.json`` maps the name of a run, whose output is FOLDER/<name>, to arguments of ``molora.train`` and, where
it goes on from the second step of another run, that run's folder. In a run whose name has the words

- ``spoilt``, the second process has a gradient that is not finite in the second step, and a loss that is;
- ``compiled``, layers are whole graphs, run by PyTorch's own operators: a compiler would take minutes;
- ``uncached``, no process tokenises rows before all have come to it;
- ``rank N killed``, that process is, in the third step;
- ``rank N without compiler``, that process finds none;
- ``rank N with another base``, its embedding is another.

Each process writes the dropout seeds of each step to FOLDER/<name>.<rank>.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import molora_kernels
from molora import adapter, cli, config, data, distributed, train, trainer
from molora.patch import compile_layers
from molora.trainer import Trainer

Seeds = dict[int, list[int]]


def cut(source: Path, output: Path) -> Path:
    """A copy of the run in ``source`` as it was after its second step."""
    return shutil.copytree(source, output, ignore=shutil.ignore_patterns("final", "checkpoint-[34]"))


def note_seeds(patch: pytest.MonkeyPatch) -> Seeds:
    """Step -> the seeds of its dropout masks, filled while a run trains."""
    seeds: Seeds = {}
    train_step, new_seed = Trainer.train_step, molora_kernels.new_dropout_seed

    def noting_step(trainer: Trainer, window: list[data.Batch]) -> Any:
        seeds[trainer.progress.step] = []
        return train_step(trainer, window)

    def noting_seed(device: torch.device) -> torch.Tensor:
        seed = new_seed(device)
        seeds[max(seeds)].append(int(seed))
        return seed

    patch.setattr(Trainer, "train_step", noting_step)
    patch.setattr(molora_kernels, "new_dropout_seed", noting_seed)
    return seeds


def spoil(patch: pytest.MonkeyPatch) -> None:
    forward = Trainer._forward

    def spoilt(trainer: Trainer, *given: Any) -> Any:
        record, loss = forward(trainer, *given)
        if (trainer.world.rank, trainer.progress.step) == (1, 1):
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return record, loss

    patch.setattr(Trainer, "_forward", spoilt)


def kill(patch: pytest.MonkeyPatch) -> None:
    """As Linux does where memory is short. All are in the third step by then, so the second's checkpoint is whole."""
    forward = Trainer._forward

    def killed(trainer: Trainer, *given: Any) -> Any:
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(trainer, *given)

    patch.setattr(Trainer, "_forward", killed)


def meet(patch: pytest.MonkeyPatch, folder: Path, world: distributed.World) -> None:
    encode_rows: Callable[..., Any] = data.encode_rows

    def encode(*given: Any, **named: Any) -> Any:
        (folder / f"came.{world.rank}").touch()
        until = time.monotonic() + 300
        while len(list(folder.glob("came.*"))) < world.size:
            assert time.monotonic() < until, "the other processes wait for this one to tokenise"
            time.sleep(0.01)
        return encode_rows(*given, **named)

    patch.setattr(data, "encode_rows", encode)


def change_base(patch: pytest.MonkeyPatch) -> None:
    build = adapter.build

    def changed(settings: config.Config, place: torch.device | None) -> Any:
        model, tokenizer = build(settings, place)
        model.get_input_embeddings().weight.data.neg_()
        return model, tokenizer

    patch.setattr(adapter, "build", changed)


def main() -> None:
    folder = Path(sys.argv[1])
    with distributed.joined() as world:
        for name, (given, source) in json.loads((folder / "runs.json").read_text()).items():
            if source:
                world.from_first(lambda source=source, name=name: cut(Path(source), folder / name))
            options = train.parse(given)
            settings = config.resolve(config.load(options.preset, options.set))
            with pytest.MonkeyPatch.context() as patch:
                seeds = note_seeds(patch)
                if "spoilt" in name:
                    spoil(patch)
                if f"rank {world.rank} killed" in name:
                    kill(patch)
                if f"rank {world.rank} without compiler" in name:
                    patch.setenv("CXX", "no-such-compiler")
                if f"rank {world.rank} with another base" in name:
                    change_base(patch)
                if "compiled" in name:
                    patch.setattr(
                        trainer, "compile_layers", partial(compile_layers, backend="aot_eager", fullgraph=True)
                    )
                if "uncached" in name:
                    meet(patch, folder, world)
                train.run(settings, options, world)
            (folder / f"{name}.{world.rank}.json").write_text(json.dumps(seeds))


if __name__ == "__main__":
    cli.run(main)
