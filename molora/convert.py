"""Adapters in and out of molora.

python -m molora.convert export outputs/…/final out/whole           # AutoModelForCausalLM opens it, routers and all
python -m molora.convert merge outputs/…/final out/lora             # one LoRA that PEFT opens
python -m molora.convert merge outputs/…/final out/dense --into base  # no adapter at all
python -m molora.convert import eulerforge_run/final out/adapter --base FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from molora import cli, eulerforge, export, merge, mixlora
from molora.adapter import describe_base, find_adapter, load, locate_base, read_manifest, save_adapter
from molora.config import Config, check
from molora.data import read_rows
from molora.errors import UserError
from molora.evaluate import evaluate
from molora.files import replacing


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` default to the process's own. Raises :class:`UserError` for bad input."""
    options = _parse(arguments)
    options.run(options)


def run_export(options: argparse.Namespace) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)`` opens."""
    model, tokenizer = _load(options)
    with replacing(options.out) as folder:
        export.save(model, tokenizer, folder)
    print(f"{options.out}: opens with AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)")


def run_merge(options: argparse.Namespace) -> None:
    """Put constant gates in place of the routers, and say what that costs on each bench."""
    cli.require_positive(options, "rank")
    model, tokenizer = _load(options)
    benches = {path: [_without_answer(row) for row in read_rows(path)] for path in options.bench}

    def losses() -> list[float | None]:
        return [evaluate(model, tokenizer, rows, title=path).loss() for path, rows in benches.items()]

    before = losses()
    gates = None if options.gates == "uniform" else merge.mean_gates(model, tokenizer, read_rows(options.gates))
    updates, kept = merge.static_updates(model, gates), []
    if options.rank is not None:
        cut = {path: merge.truncate(update, options.rank) for path, update in updates.items()}
        updates = {path: update for path, (update, _) in cut.items()}
        kept = [share for _, share in cut.values()]
    merge.as_lora(model, updates)
    if options.into == "base":
        merge.into_base(model, updates)
    after = losses()
    with replacing(options.out) as folder:
        if options.into == "base":
            model.save_pretrained(folder)
        else:
            merge.save_peft_lora(model, updates, folder)
        tokenizer.save_pretrained(folder)

    ranks = sorted({len(update.a) for update in updates.values()})
    what = "the base weights" if options.into == "base" else f"a LoRA of rank {' and '.join(map(str, ranks))}"
    print(f"{options.out}: {len(updates)} adapters merged into {what}, gates: {options.gates}")
    if kept:
        print(f"of each update's squared norm, {min(kept):.1%} to {max(kept):.1%} is kept")
    for path, routed, merged in zip(benches, before, after, strict=True):
        if routed is not None and merged is not None:
            print(f"{path}: loss {routed:.4f} with routers, {merged:.4f} merged ({merged / routed - 1:+.1%})")
    if not benches:
        print("what it costs was not measured: give --bench FILE")


def run_import(options: argparse.Namespace) -> None:
    """Write an adapter that EulerForge or MoE-PEFT trained as an adapter folder."""
    given = Path(options.adapter)
    _check_out(options, given, Path(options.base))
    model, tokenizer = load(options.base, options.device, _precision(options, options.base))
    (mixlora if mixlora.recognises(given) else eulerforge).put_on(model, given)
    with replacing(options.out) as folder:
        save_adapter(model, folder)
        tokenizer.save_pretrained(folder)
    print(f"{options.out}: opens with molora.load")


def _load(options: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    folder = find_adapter(options.adapter)
    if folder is None:
        raise UserError(
            f"{options.adapter}: no adapter folder (adapter.safetensors and molora.json), and none that can be fetched "
            "from the Hugging Face hub; give a stage's final/, or a hub name"
        )
    manifest = read_manifest(folder)
    _check_out(options, folder, folder / manifest["base_model"])
    return load(folder, options.device, _precision(options, locate_base(folder, manifest)))


def _precision(options: argparse.Namespace, base: str) -> str:
    """``--precision``, or that of the base's files; fp32, which loses nothing, where its config.json does not say."""
    if options.precision != "auto":
        return options.precision
    dtype = describe_base(check(Config, {"model_name": base}))[0].dtype
    return {"bfloat16": "bf16", "float16": "fp16"}.get(str(dtype).removeprefix("torch."), "fp32")


def _check_out(options: argparse.Namespace, *read: Path) -> None:
    """Refuse to write over what was not asked for: other things than a model, and what is read."""
    out: Path = options.out
    if out.exists() and not options.overwrite:
        raise UserError(f"{out}: exists; choose another folder, or give --overwrite")
    of_models = ("config.json", "molora.json", "adapter_config.json")
    if out.exists() and not any((out / name).is_file() for name in of_models):
        raise UserError(
            f"{out}: is no folder of a model or adapter, so --overwrite does not replace it; choose another"
        )
    for path in read:
        if path.exists() and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"{out}: {path} is read from there; choose another folder")


def _without_answer(row: Any) -> Any:
    """The row for its loss alone: an ``answer`` would be generated and judged too, which takes minutes."""
    return {key: value for key, value in row.items() if key != "answer"}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m molora.convert", description="Adapters in and out of molora.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("export", help="one folder with base, experts and routers, for transformers")
    command.set_defaults(run=run_export)
    _add_common(command)

    command = commands.add_parser("merge", help="one LoRA, or no adapter, in place of experts and routers")
    command.set_defaults(run=run_merge)
    _add_common(command)
    command.add_argument("--into", choices=("lora", "base"), default="lora", help="default: %(default)s")
    command.add_argument("--rank", type=int, help="approximate each update with this rank; default: exact, E r")
    command.add_argument(
        "--gates", default="uniform", metavar="FILE", help="rows whose mean gates to use; default: all experts alike"
    )
    command.add_argument(
        "--bench", action="append", default=[], metavar="FILE", help="rows to measure the loss on, before and after"
    )

    command = commands.add_parser("import", help="an adapter of EulerForge's mixture_lora or MoE-PEFT's MixLoRA")
    command.set_defaults(run=run_import)
    _add_common(command)
    command.add_argument("--base", required=True, help="the model that the run started from, a folder or hub name")
    return parser.parse_args(arguments)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", help="folder to read, such as a stage's final/; export and merge: or a hub name")
    command.add_argument("out", type=Path, help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    # Without int8 and int4, which can neither be merged nor exported.
    cli.add_model_options(command, cli.PRECISIONS[:4], auto="its own")


if __name__ == "__main__":
    cli.run(main)
