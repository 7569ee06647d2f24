"""``python -m molora.train``: one stage of training from a preset.

    python -m molora.train --preset configs/presets/reasoning/llama3.2_3b_mixture_lora_sft.yml \\
        --set data.path=data/sft_50k_en_ko_raw.jsonl --output-dir outputs/reasoning/stage1_general_sft
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from molora import checkpoint, cli, distributed, preflight, provenance, trackers
from molora.adapter import check_there, is_adapter, pick_device, read_manifest
from molora.config import Config, find_preset, load, resolve, to_yaml, without_effect
from molora.data import Row, hold_out, read_rows
from molora.errors import UserError
from molora.trainer import Trainer

_log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` default to the process's own. Raises :class:`UserError` for bad input."""
    options = parse(arguments)
    overrides = list(options.set)
    if options.metrics_level:
        overrides.append(f"logging.metrics_level={options.metrics_level}")
    config = load(options.preset, overrides)
    with distributed.joined() as world:
        run(config, options, world)


def run(config: Config, options: argparse.Namespace, world: distributed.World) -> None:
    """What the options ask for, with the processes of ``world``."""
    step_unit, config = config.training.step_unit, resolve(config)
    for told in without_effect(config.training) if world.first else ():
        _log.warning("warning: %s", told)
    name = find_preset(options.preset).stem
    if not options.output_dir and not name.strip("."):
        raise UserError(f"{options.preset}: gives no name for a folder in outputs/; give --output-dir")
    output = Path(options.output_dir or Path("outputs") / name)
    if options.print_config:
        print(to_yaml(config), end="")
        return
    if options.memory_gb and not options.preflight:
        raise UserError("--memory-gb says what --preflight plans for; give both")
    if options.preflight:
        if world.size > 1:
            raise UserError("--preflight looks at one device: run it without torchrun")
        preflight.report(config, output, check_inputs(config, output, resume=True), options.memory_gb, step_unit)
        return
    given = {"resume": options.resume, "overwrite": options.overwrite, "processes": world.size}
    rows = world.together(lambda: check_inputs(config, output, **given))
    if options.validate_only:
        print(f"{options.preset}: valid, {len(rows)} rows, {config.training.max_train_steps} optimizer steps")
        return
    if options.resume and world.from_first(lambda: checkpoint.finished(output)):
        sources = provenance.collect(config, world.size)
        world.together(lambda: checkpoint.check_same_run(output / checkpoint.FINAL, config, sources))
        print(f"{output}: finished already, nothing to resume")
        return
    try:
        Trainer(config, output, rows, resume=options.resume, world=world).train()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full ({error}); set model.gradient_checkpointing=non_reentrant, lower "
            "training.batch_size and raise training.grad_accum_steps (--preflight says to what, and what else then "
            "changes), or lower data.max_length; then --overwrite"
        ) from error


def check_inputs(
    config: Config, output: Path, *, resume: bool = False, overwrite: bool = False, processes: int = 1
) -> list[Row]:
    """Everything that can be wrong with the inputs and is seen without loading a model; returns the data rows.

    Changes nothing. Raises :class:`UserError`.
    """
    if processes > 1:
        _check_shared(config, processes)
    checkpoint.claim(output, resume=resume, overwrite=overwrite)
    pick_device(config.device)
    trackers.require(config.logging)
    if config.model_name is None:
        raise UserError("model_name is missing: --set model_name=FOLDER_OR_HUB_NAME")
    model = Path(config.model_name)
    if is_adapter(model):
        read_manifest(model)
    else:
        check_there(config.model_name)
    if overwrite and output.resolve() in model.resolve().parents:
        raise UserError(f"model_name={model} lies in {output}, which --overwrite would discard; choose another folder")
    if config.data.path is None:
        raise UserError("data.path is missing: --set data.path=FILE.jsonl")
    rows = read_rows(config.data.path)
    hold_out(rows, config.training.val_size, config.seed)
    return rows


def _check_shared(config: Config, processes: int) -> None:
    """What works in one process, and not in several."""
    if config.device.startswith("cuda:"):
        raise UserError(f"device: {config.device} is one device, and here are {processes} processes; use device: cuda")
    if config.training.parallel == "fsdp" and config.model.load_precision.mode in ("int8", "int4"):
        raise UserError("training.parallel: fsdp spreads bases of 16 or 32 bits only; use ddp for int8 and int4")


def positive(text: str) -> float:
    """An option's value as a number above 0; argparse explains a ValueError."""
    if not (value := float(text)) > 0:
        raise ValueError
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line; argparse explains wrong ones and exits with code 2."""
    parser = argparse.ArgumentParser(prog="python -m molora.train", description="Train one stage from a preset.")
    parser.add_argument(
        "--preset", required=True, metavar="FILE|NAME", help="YAML file, or the name of a preset of ours"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override a key of the preset; repeatable; a list item by its index: training.phases.1.step=10",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="default: outputs/<name of the preset>")
    parser.add_argument("--metrics-level", choices=("minimal", "advanced"), help="advanced logs routing per layer")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    earlier.add_argument("--overwrite", action="store_true", help="discard an earlier run in the output folder")
    parser.add_argument("--validate-only", action="store_true", help="check configuration and inputs, then stop")
    parser.add_argument(
        "--preflight", action="store_true", help="show memory, steps and time that the stage needs, then stop"
    )
    parser.add_argument(
        "--memory-gb", type=positive, metavar="N", help="with --preflight: plan for a GPU with N GB, wherever you are"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration, then stop")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run(main)
