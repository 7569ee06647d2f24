"""Tasks of EleutherAI's lm-evaluation-harness on a molora model: ``pip install 'molora[eval]'``.

The harness gets the patched model itself, so its numbers are those of the model that ``molora.load`` gives. Its answers
to requests are kept by the request's own text: a killed run goes on, and changed data are asked anew. They are kept as
JSON: the harness has a cache of its own, of pickles, which run whatever code their writer put there. A task's YAML may
name Python functions, which the harness runs: give ``--lm-eval-path`` only folders that you trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molora.errors import UserError
from molora.journal import Lines, digest


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    key: Mapping[str, Any] | None = None,
    kept: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The harness's own results, task -> metric -> value, with standard errors as ``<metric>_stderr``.

    Args:
        tasks: names of tasks, groups or tags, those of the harness or of the YAML files in ``path``.
        limit: only the first so many documents of each task.
        chat: put requests into the model's chat template.
        key: what decides an answer beside this function's own arguments: the model and what computes it.
        kept: folder of the file that keeps answers, by request; None: they are not kept.

    Raises:
        UserError: the package is missing, a task is unknown, or its data cannot be had.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports] # an extra
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"--lm-eval needs the package lm-eval ({error}): pip install 'molora[eval]'") from None
    if path is not None and not path.is_dir():
        raise UserError(f"--lm-eval-path {path}: no such folder; give one with the tasks' YAML files")
    # Its own tasks are thousands of files to index, which tasks in --lm-eval-path alone need not wait for.
    manager = TaskManager(include_path=None if path is None else str(path), include_defaults=path is None)
    if path is not None and _unknown(manager, tasks):
        manager = TaskManager(include_path=str(path))
    if unknown := _unknown(manager, tasks):
        raise UserError(f"--lm-eval {','.join(unknown)}: no task of lm-eval {version()} nor of --lm-eval-path")
    wrap: Any = HFLM  # both are typed as what their decorators take
    simple_evaluate: Any = lm_eval.simple_evaluate
    patched = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    if kept is not None:
        key = {"model": key, "lm-eval": version(), "batch_size": batch_size, "chat": chat}
        _Kept(patched, Lines(key, kept / f"lm-eval-{digest(key)}.jsonl"))
    try:
        found = simple_evaluate(
            patched,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
        )
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise UserError(f"--lm-eval {','.join(tasks)}: {error}") from error
    assert found is not None  # None is for the other processes of a distributed run
    return {task: dict(values) for task, values in found["results"].items()}


class _Kept:
    """Between lm-eval and its model: answers of earlier runs are found, new ones are written down."""

    def __init__(self, lm: Any, lines: Lines) -> None:
        self._lines = lines
        # JSON has no tuples, which is what a log-probability with its greediness is.
        self._answers = {
            entry["request"]: tuple(entry["answer"]) if isinstance(entry["answer"], list) else entry["answer"]
            for entry in lines.read()
        }
        lines.begin()
        lm.set_cache_hook(self)  # it calls add_partial with every answer, as soon as there is one
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, partial(self._ask, kind, getattr(lm, kind)))

    def _ask(self, kind: str, ask: Callable[..., list[Any]], requests: Sequence[Any], **options: Any) -> list[Any]:
        names = [_name(kind, request.args) for request in requests]
        new = [i for i, name in enumerate(names) if name not in self._answers]
        found = dict(zip(new, ask([requests[i] for i in new], **options) if new else [], strict=True))
        for i, answer in found.items():
            self._add(names[i], answer)
        return [found[i] if i in found else self._answers[name] for i, name in enumerate(names)]

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        self._add(_name(kind, arguments), answer)

    def _add(self, name: str | None, answer: Any) -> None:
        if name is not None and name not in self._answers:
            self._answers[name] = answer
            self._lines.add({"request": name, "answer": answer})


def _name(kind: str, arguments: Sequence[Any]) -> str | None:
    """Of a request; None for one whose answer is a draw, which is drawn again each time."""
    if kind == "generate_until" and arguments[1].get("do_sample"):
        return None
    return hashlib.sha256(json.dumps([kind, *arguments]).encode()).hexdigest()


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def version() -> str:
    """Of the harness."""
    return metadata.version("lm-eval")


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """A row per task and metric, a column per model; ± is the harness's standard error."""
    made = Table(title=f"lm-eval {version()}", title_justify="left")
    for heading in ("task", "metric", *results):
        made.add_column(escape(heading), justify="left" if heading in ("task", "metric") else "right")
    first = next(iter(results.values()))
    for task, values in first.items():
        metrics = [key for key, value in values.items() if isinstance(value, float) and "_stderr" not in key]
        for n, metric in enumerate(metrics):
            cells = [_cell(of.get(task, {}), metric) for of in results.values()]
            made.add_row(escape(task) if n == 0 else "", escape(metric.removesuffix(",none")), *cells)
        made.add_section()
    return made


def _cell(values: Mapping[str, Any], metric: str) -> str:
    if metric not in values:
        return ""
    name, _, answer_filter = metric.partition(",")
    error = values.get(f"{name}_stderr,{answer_filter}")
    return f"{values[metric]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
