"""lm-eval's real harness on a molora folder: YAML tasks and data from local files, nothing from a network."""

import json
from pathlib import Path

import pytest
import torch

from conftest import WORDS, make_rows, write_jsonl
from molora import evaluate, harness, inject, save_adapter
from molora.adapter import load
from molora.errors import UserError

huggingface = pytest.importorskip(
    "lm_eval.models.huggingface", reason="lm-eval is not installed: pip install 'molora[eval]'"
)

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: "" # the choices begin with a space of their own
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: local_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{response}}}}"
generation_kwargs: {{until: ["one"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def setting(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An adapter that changes what the model says, and a folder of tasks."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model, _ = load(tiny_model_dir, device="cpu", precision="fp32")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inject(model, {"num_experts": 4, "top_k": 2, "lora_r": 8, "lora_alpha": 64, "init_b_std": 0.5})
    adapter = save_adapter(model, tmp_path / "final")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [
        row | {"choices": [f" {word}" for word in WORDS[i : i + 4]], "gold": i % 4}
        for i, row in enumerate(make_rows(12))
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    (tasks / "choice.yaml").write_text(CHOICE.format(name="local_choice", data=data))
    (tasks / "write.yaml").write_text(WRITE.format(data=data))
    return adapter, tasks


def picked(model, tokenizer, rows: list[dict]) -> list[int]:
    """The likeliest choice of each row by the model's own log-probabilities, one sequence at a time."""
    best = []
    for row in rows:
        sums = []
        for choice in row["choices"]:
            prompt, whole = tokenizer(row["prompt"]).input_ids, tokenizer(row["prompt"] + choice).input_ids
            with torch.no_grad():
                log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(log_p[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        best.append(sums.index(max(sums)))
    return best


def test_harness_measures_the_patched_model(setting: tuple[Path, Path], tiny_model_dir: Path, tmp_path: Path) -> None:
    """In fp32, because in bf16 the choices of a random model are closer to one another than rounding."""
    adapter, tasks = setting
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    chosen = []
    for folder in (tiny_model_dir, adapter):
        model, tokenizer = load(folder, device="cpu", precision="fp32")
        found = harness.run(model, tokenizer, ["local_choice"], path=tasks)
        chosen.append(picked(model, tokenizer, rows))
        right = sum(choice == row["gold"] for choice, row in zip(chosen[-1], rows, strict=True))
        assert found["local_choice"]["acc,none"] == pytest.approx(right / len(rows))
    assert chosen[0] != chosen[1]  # the adapter says something else than its base


def test_command_line(setting: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, tasks = setting
    output, kept = tmp_path / "result.json", tmp_path / "kept"
    evaluate.main(
        [
            *("--model", "base", "--model", str(adapter), "--device", "cpu", "--output", str(output)),
            *("--lm-eval", "local_choice,local_write", "--lm-eval-path", str(tasks), "--kept", str(kept)),
        ]
    )
    found = json.loads(output.read_text())["lm_eval"]["results"]
    assert list(found) == ["base", str(adapter)]
    for tasks_found in found.values():
        assert 0 <= tasks_found["local_choice"]["acc,none"] <= 1
        assert tasks_found["local_write"]["exact_match,none"] == 0
    shown = capsys.readouterr().out
    assert "local_choice" in shown and "exact_match" in shown
    assert len(list(kept.iterdir())) == 2


def test_answers_are_kept_for_the_model_and_settings_that_gave_them(
    setting: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, tasks = setting
    model, tokenizer = load(adapter, device="cpu", precision="fp32")
    asked: list[int] = []
    for name in ("loglikelihood", "generate_until"):
        method = getattr(huggingface.HFLM, name)
        monkeypatch.setattr(
            huggingface.HFLM,
            name,
            lambda lm, requests, method=method, **rest: (asked.append(len(requests)), method(lm, requests))[1],
        )

    def run(**changed) -> dict:
        asked.clear()
        settings = {"limit": 3, "key": {"model": 1}, "kept": tmp_path / "kept"} | changed
        return harness.run(model, tokenizer, ["local_choice", "local_write"], path=tasks, **settings)

    first = run()
    assert sorted(asked) == [3, 12]
    [file] = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # as a crash would leave it
    assert run() == first and asked == [1]
    for changed in ({"batch_size": 2}, {"chat": True}, {"key": {"model": 2}}):
        run(**changed)
        assert sorted(asked) == [3, 12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # slow: all of the harness's own tasks are looked through
        pytest.param(["--lm-eval", "no_such_task"], "--lm-eval no_such_task: no task", marks=pytest.mark.slow),
        (["--lm-eval", "local_choice", "--lm-eval-path", "nowhere"], "--lm-eval-path nowhere: no such folder"),
    ],
)
def test_refused(arguments: list[str], message: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.main(["--model", str(tiny_model_dir), "--device", "cpu", "--kept", str(tmp_path), *arguments])


def test_missing_data_is_the_users_to_mend(setting: tuple[Path, Path], tiny_model_dir: Path, tmp_path: Path) -> None:
    (setting[1] / "gone.yaml").write_text(CHOICE.format(name="gone", data=tmp_path / "gone.jsonl"))
    model, tokenizer = load(tiny_model_dir, device="cpu")
    with pytest.raises(UserError, match="--lm-eval gone"):
        harness.run(model, tokenizer, ["gone"], path=setting[1])
