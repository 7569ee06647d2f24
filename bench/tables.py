"""Tables of the documentation, as text between two markers, from results alone.

``<!-- bench:NAME -->`` … ``<!-- /bench:NAME -->``: what stands between is :data:`BLOCKS`'s NAME. No number there is
written by hand, and a test compares them with the results.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bench.provenance import commit_of

Result = Mapping[str, Any]
Results = Mapping[str, Result]

NOT_MEASURED = "not measured"
MARKED = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def fill(text: str, results: Results) -> str:
    """The page with every marked block made anew."""
    return MARKED.sub(lambda found: found[1] + BLOCKS[found[2]](results) + found[3], text)


# --- pieces ------------------------------------------------------------------------------------------------------


def _row(result: Result | None, variant: str) -> Result | None:
    return next((row for row in (result or {}).get("rows", ()) if row["variant"] == variant), None)


def _cell(result: Result | None, variant: str, key: str, form: str = "{:.2f}") -> str:
    row = _row(result, variant)
    return NOT_MEASURED if row is None or key not in row else form.format(row[key])


def _variants(found: Iterable[Result | None]) -> list[str]:
    """In the order of the fullest result."""
    every = sorted((r for r in found if r), key=lambda r: -len(r["rows"]))
    return list(dict.fromkeys(row["variant"] for result in every for row in result["rows"]))


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _name(variant: str) -> str:
    return f"**{variant}**" if variant == "molora" else variant


def _origin(result: Result) -> str:
    """Where a result came from, in one sentence."""
    of = result["provenance"]
    machine = of["gpu"] if _device(result) == "cuda" else f"{of['cpu']}, {result['threads']} threads"
    dirty = " with uncommitted changes" if of["uncommitted_changes"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in of["packages"].items())
    return f"{machine}; {commit_of(of)}{dirty}; {packages}"


def _device(result: Result) -> str:
    shape = result["runs"][0]["shape"] if "runs" in result else result["shape"]
    return shape["device"]


def _short_device(result: Result) -> str:
    return "CPU" if _device(result) == "cpu" else result["provenance"]["gpu"].removeprefix("NVIDIA ")


def _absent(result: Result) -> str:
    """Reasons for what has no time, one line each."""
    both = {
        **result.get("not_measured", {}),
        **{name: f"wrong: {why}" for name, why in result.get("wrong", {}).items()},
    }
    return "".join(f"- {name}: {NOT_MEASURED}, {why}.\n" for name, why in both.items())


# --- blocks ------------------------------------------------------------------------------------------------------


SHORT = ("frozen base", "molora", "PEFT LoRA r=64", "PEFT LoRA r=128", "naive loop", "mixlora", "eulerforge")
"""Who is in the short table: what others use, beside both ends."""


def speed(results: Results) -> str:
    """The block and the step over the frozen base, on both kinds of device, of those whom everybody asks for first."""
    columns = {
        "mlp-cuda-bf16": "block, {}, bf16",
        "step-cuda-bf16-stage2-checkpointing": "step, {}, bf16",
        "mlp-cpu-fp32": "block, {}, fp32",
        "mlp-cpu-bf16": "block, {}, bf16",
        "step-cpu-fp32": "step, {}, fp32",
    }
    there = {name: result for name in columns if (result := results.get(name))}
    found = {columns[name].format(_short_device(result)): result for name, result in there.items()}
    if not found:
        return f"{NOT_MEASURED.capitalize()} yet.\n"
    rows = ([_name(v), *(_cell(r, v, "ratio").replace(NOT_MEASURED, "") for r in found.values())] for v in SHORT)
    return _table(["time over the frozen base, forward + backward", *found], rows)


ON_CPUS = {
    "fp32": "mlp-cpu-fp32",
    "bf16": "mlp-cpu-bf16",
    "fp32, dropout 0.05": "mlp-cpu-fp32-dropout",
    "training step, tiny Llama, fp32": "step-cpu-fp32",
}
AMX = "-amx"
"""Ends the names of the block's and the step's results on a CPU with matrix units, which are shown beside another's."""


def speed_cpu(kind: str = "") -> Callable[[Results], str]:
    """The block and the step over the frozen base on a CPU."""

    def block(results: Results) -> str:
        found = {head: results.get(name + kind) for head, name in ON_CPUS.items()}
        if not any(found.values()):
            return f"{NOT_MEASURED.capitalize()} yet.\n"
        rows = (
            [
                _name(v),
                *(_cell(r, v, "ratio") for r in found.values()),
                _cell(found["fp32"], v, "saved_mib", "{:.0f} MiB"),
            ]
            for v in _variants(found.values())
        )
        head = "time over the frozen base, forward + backward"
        return _table([head, *found, "saved for backward, fp32"], rows)

    return block


def speed_amx(results: Results) -> str:
    """The other CPU's numbers as one sentence, for a page whose table has one CPU's."""
    parts = {"the block in fp32": "fp32", "in bf16": "bf16", "the step": "training step, tiny Llama, fp32"}
    found = {what: results.get(ON_CPUS[head] + AMX) for what, head in parts.items()}
    numbers = [
        f"{what} {_cell(result, 'molora', 'ratio')} (PEFT r=64 {_cell(result, 'PEFT LoRA r=64', 'ratio')})"
        for what, result in found.items()
        if result
    ]
    return f"On an Intel Xeon with AMX: {', '.join(numbers)}.\n" if numbers else f"{NOT_MEASURED.capitalize()} yet.\n"


def generation(device: str, dtype: str) -> Callable[[Results], str]:
    """Milliseconds a token with a KV cache, and of the prompt before it."""

    def block(results: Results) -> str:
        result = results.get(f"decode-{device}-{dtype}")
        if result is None:
            return f"{NOT_MEASURED.capitalize()} yet.\n"
        rows = []
        for row in result["rows"]:
            for part in ("token", "prompt"):
                of = row[part]
                low, high = of["ratio_quartiles"]
                name = "a token" if part == "token" else f"the prompt, {result['shape']['tokens']} tokens a row"
                times = [
                    f"{of['base_ms']:.0f}",
                    f"{of['molora_ms']:.0f}",
                    f"{of['ratio']:.2f} ({low:.2f} to {high:.2f})",
                ]
                rows.append([str(row["batch"]), name, *times])
        return _table(["rows at a time", "", "base, ms", "molora, ms", "ratio (quartiles)"], rows)

    return block


def generation_ratios(results: Results) -> str:
    """The same as one sentence: every number of rows that was measured, not the best one."""
    result = results.get("decode-cpu-bf16")
    if result is None:
        return f"{NOT_MEASURED.capitalize()} yet.\n"
    rows, shape = result["rows"], result["shape"]
    batches = _extent([row["batch"] for row in rows], "d")
    token, prompt = (_extent([row[part]["ratio"] for row in rows], ".2f") for part in ("token", "prompt"))
    return (
        f"With {batches} rows at a time, on {result['threads']} threads, a token takes {token} times as long as the "
        f"base's,\nreading a prompt of {shape['tokens']} tokens a row {prompt} times.\n"
    )


def _extent(numbers: list[Any], form: str) -> str:
    """From the smallest to the largest."""
    return " to ".join(dict.fromkeys(f"{number:{form}}" for number in (min(numbers), max(numbers))))


def compiled_step(results: Results) -> str:
    """The training step with and without ``torch.compile``."""
    result = results.get("step-cpu-fp32-compile")
    if result is None:
        return f"{NOT_MEASURED.capitalize()} yet.\n"
    rows = (
        [
            _name(row["variant"]),
            f"{row['fwd_ms']:.0f}",
            f"{row['bwd_ms']:.0f}",
            "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["ratio_quartiles"]),
        ]
        for row in result["rows"]
    )
    return _table(
        ["training step, tiny Llama, fp32", "forward, ms", "backward, ms", "over the frozen base (quartiles)"], rows
    )


def origin_cpu(results: Results) -> str:
    """What the CPU's numbers were measured with."""
    return _origins(results, "cpu", "mlp-cpu-fp32")


def _origins(results: Results, device: str, full: str) -> str:
    mine = {name: result for name, result in results.items() if _device(result) == device}
    if not mine:
        return f"{NOT_MEASURED.capitalize()} yet.\n"
    by_origin: dict[str, list[str]] = {}
    for name, result in mine.items():
        by_origin.setdefault(_origin(result), []).append(f"`{name}`")
    lines = "".join(f"- {', '.join(names)}: {origin}.\n" for origin, names in by_origin.items())
    return lines + (_absent(mine[full]) if full in mine else "")


def speed_gpu(results: Results) -> str:
    """The block at Llama-3.2-3B's size, and the step at both stages' shapes, on a GPU: what was measured of it."""
    sweep = results.get("sweep-cuda-bf16-experts")
    ours = (run for run in (sweep or {}).get("runs", ()) if run["shape"]["experts"] == 4)
    found = {}
    for head, result, whole in (
        ("block, ", results.get("mlp-cuda-bf16"), results.get("mlp-cuda-bf16")),
        ("block again, ", next(ours, None), sweep),
        ("beside torch.compile, ", *[results.get("mlp-cuda-bf16-compile")] * 2),
        ("dropout 0.05, ", *[results.get("mlp-cuda-bf16-dropout")] * 2),
    ):
        found[head + commit_of(whole["provenance"]) if whole else head] = result
    again = ", recomputing layers"
    kinds = {"": "", "-checkpointing": again, "-whole": f"{again}, twice the rows", "-compile": f"{again}, compiled"}
    for n, (suffix, what) in itertools.product((1, 2), kinds.items()):
        found[f"step, stage {n}{what}"] = results.get(f"step-cuda-bf16-stage{n}{suffix}")
    found = {head: result for head, result in found.items() if result}
    if not found:
        return f"{NOT_MEASURED.capitalize()} yet.\n"
    steps = [result for head, result in found.items() if head.startswith("step")]
    rows = (
        [
            _name(v),
            *(_cell(r, v, "ratio") for r in found.values()),
            *(_cell(r, v, "tokens_per_s", "{:,.0f}") for r in steps[-1:]),
            *(_gib(r, v) for r in steps[-1:]),
        ]
        for v in _variants(found.values())
    )
    more = ["tokens/s of it", "peak memory of it"] if steps else []
    filled = ([cell.replace(NOT_MEASURED, "") for cell in row] for row in rows)
    return _table(["time over the frozen base, forward + backward", *found, *more], filled)


def host(results: Results) -> str:
    """Launches of a layer and the host's time for them, with its activations kept and recomputed."""
    kept, again = results.get("host-sm90"), results.get("host-sm90-checkpointing")
    if kept is None or again is None:
        return f"{NOT_MEASURED.capitalize()} yet.\n"

    def launches(result: Result, row: Result) -> str:
        found = _row(result, row["variant"]) or row
        ours = f" ({found['kernels']} of Triton)" if found["kernels"] else ""
        return f"{found['kernels'] + found['operators']}{ours}"

    rows = (
        [
            _name(row["variant"]),
            *(cell for r in (kept, again) for cell in (launches(r, row), _cell(r, row["variant"], "ratio"))),
        ]
        for row in kept["rows"]
    )
    heads = ["launches", "host's time over the frozen layer's"]
    return _table(["a layer, forward and backward", *heads, *(f"{head}, recomputed" for head in heads)], rows)


def recipe(results: Results) -> str:
    """Both stages at their own size, on each device that has run them."""
    rows, origins = [], []
    for name, result in results.items():
        if not name.startswith("recipe-"):
            continue
        origins.append(f"{_short_device(result)}: {_origin(result)}.\n")
        for row in result["rows"]:
            on_gpu = "peak_memory_gb" in row
            memory = f"{row['peak_memory_gb' if on_gpu else 'resident_gb']:.1f} GB" + ("" if on_gpu else " of the host")
            times = [
                f"{row['tokens_per_step']:,}",
                f"{row['seconds_per_step']:.1f} s",
                f"{row['tokens_per_second']:,.0f}",
            ]
            rows.append([f"{row['variant']}, {_short_device(result)}", *times, memory])
    if not rows:
        return f"{NOT_MEASURED.capitalize()} yet.\n"
    heads = ["random weights", "tokens of a step", "time of a step", "tokens/s", "memory at most"]
    return _table(heads, rows) + "\n" + "\n".join(origins)


def _gib(result: Result | None, variant: str) -> str:
    row = _row(result, variant)
    if row is None or "peak_mib" not in row:
        return NOT_MEASURED
    return f"{(row['static_mib'] + row['peak_mib']) / 1024:.1f} GiB"


def ops(device: str, dtype: str) -> Callable[[Results], str]:
    """Each operation's floor and what of it was reached."""

    def block(results: Results) -> str:
        result = results.get(f"op-{device}-{dtype}")
        if result is None:
            return f"{NOT_MEASURED.capitalize()} yet.\n"
        rows = []
        for name, case in result["cases"].items():
            base, ours = case["rows"][:1], [row for row in case["rows"] if "floor_ms" in row]
            if not (ours and base):
                rows.append([name, *[""] * 2, *[NOT_MEASURED] * 7])
            for row in ours:
                form = "chosen experts" if row["variant"] == "molora grouped" else ""
                for i, (part, ms) in enumerate((("forward", "fwd_ms"), ("backward", "bwd_ms"))):
                    rows.append(
                        [
                            name,
                            form,
                            part,
                            f"{row['gflop'][i]:.1f}",
                            f"{1e3 * row['gbyte'][i]:.0f}",
                            f"{row['floor_ms'][i]:.2f}",
                            f"{row[ms]:.2f}",
                            f"{100 * row['share'][i]:.0f} %",
                            f"{base[0]['variant']} {base[0][ms]:.2f}",
                            "" if i else _spent(row["spent"]),
                        ]
                    )
        shape, machine = result["shape"], result["roofline"]
        size = f"T = {shape['tokens']}, hidden {shape['hidden']}, intermediate {shape['intermediate']}"
        head = (
            f"{size}, {shape['dtype']}; this machine's roofline, measured in the same run: "
            f"{machine['gflop_per_s']:,.0f} GFLOP/s, {machine['gbyte_per_s']:.1f} GB/s.\n\n"
        )
        heads = [
            "operation",
            "",
            "",
            "GFLOP",
            "MB",
            "floor, ms",
            "measured, ms",
            "of the floor",
            "beside, ms",
            "where forward and backward's time goes",
        ]
        return head + _table(heads, rows)

    return block


def _spent(shares: Mapping[str, float]) -> str:
    """What took the time, by names that mean something to a reader."""
    named: dict[str, float] = {}
    for key, part in shares.items():
        name = next((name for pattern, name in _NAMES if re.match(pattern, key)), key)
        if name.startswith("void "):  # a template of PyTorch's
            name = re.split(r"[<(]", name.removeprefix("void "))[0].split("::")[-1]
        named[name] = named.get(name, 0.0) + part
    return ", ".join(f"{name} {100 * part:.0f} %" for name, part in named.items())


_NAMES = (
    ("nvjet", "cuBLAS"),
    ("## Call CompiledFxGraph", "compiled passes"),
    (r"molora\.", "C++ kernels"),
    ("GeneratedBackwardFor_molora|molora::|_Node", "molora's Python"),  # an operator's own time, without what it calls
)
"""How profilers call a thing, and we."""


def dispatch(device: str) -> Callable[[Results], str]:
    """Both forms' measured times, and which the rule takes."""

    def block(results: Results) -> str:
        rows = []
        for result in (r for name, r in results.items() if name.startswith(f"sweep-{device}-")):
            if result["over"] == "layers":
                continue
            for run in result["runs"]:
                forms = {form: _row(run, f"molora {form}") for form in ("dense", "grouped")}
                dense, grouped = forms["dense"], forms["grouped"]
                if dense is None or grouped is None or run["shape"]["top_k"] >= run["shape"]["experts"]:
                    continue  # where all experts are chosen there is one form
                shape, chosen = run["shape"], run["chosen_form"]
                times = {"dense": dense["total_ms"], "grouped": grouped["total_ms"]}
                lost = times[chosen] / min(times.values()) - 1
                rows.append(
                    [
                        shape["dtype"],
                        *(str(shape[key]) for key in ("tokens", "experts", "top_k", "rank")),
                        f"{dense['ratio']:.2f}",
                        f"{grouped['ratio']:.2f}",
                        chosen,
                        f"{100 * lost:.0f} %",
                    ]
                )
        if not rows:
            return f"{NOT_MEASURED.capitalize()} yet.\n"
        return _table(["dtype", "T", "E", "k", "r", "dense", "grouped", "the rule takes", "and loses"], rows)

    return block


def plots(device: str) -> Callable[[Results], str]:
    """The plots that there are results for."""

    def block(results: Results) -> str:
        lines = []
        if any(name.startswith(f"sweep-{device}-") and name.endswith("-tokens") for name in results):
            lines.append(f"![Percent over the frozen base against tokens, {device}](bench/{device}-tokens.png)\n")
        if any(name.startswith(f"sweep-{device}-") and not name.endswith("-tokens") for name in results):
            lines.append(f"![Cost as work grows, {device}](bench/{device}-sweeps.png)\n")
        return "\n".join(lines) or f"{NOT_MEASURED.capitalize()} yet.\n"

    return block


BLOCKS: dict[str, Callable[[Results], str]] = {
    "speed": speed,
    "speed-cpu": speed_cpu(),
    "speed-cpu-amx": speed_cpu(AMX),
    "speed-amx": speed_amx,
    "speed-gpu": speed_gpu,
    "decode-cpu": generation("cpu", "bf16"),
    "decode-cpu-ratios": generation_ratios,
    "compile-cpu": compiled_step,
    "host": host,
    "recipe": recipe,
    "origin-cpu": origin_cpu,
    "origin-cuda": lambda results: _origins(results, "cuda", "mlp-cuda-bf16"),
    "ops-cpu-fp32": ops("cpu", "fp32"),
    "ops-cpu-bf16": ops("cpu", "bf16"),
    "ops-cuda-bf16": ops("cuda", "bf16"),
    "dispatch-cpu": dispatch("cpu"),
    "dispatch-cuda": dispatch("cuda"),
    "plots-cpu": plots("cpu"),
    "plots-cuda": plots("cuda"),
}
