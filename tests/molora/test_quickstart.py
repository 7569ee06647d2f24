"""The quickstart on a tiny random model: all parts once, none twice, and inputs that changed are noticed."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import make_rows, write_jsonl
from molora import checkpoint, evaluate, quickstart, train
from molora.config import load
from molora.errors import UserError

PRESET = """
injection: {num_experts: 2, top_k: 1, lora_r: 2}
training: {max_train_steps: 4, batch_size: 2, save_steps: 1, log_steps: 1, lr: 0.01}
data: {max_length: 64}
"""


Folders = tuple[Path, Path]
"""Data folder and output folder."""


@pytest.fixture(scope="module", autouse=True)
def presets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Presets and settings of a few seconds."""
    presets = tmp_path_factory.mktemp("presets")
    for preset, _ in quickstart.STAGES.values():
        (presets / preset).write_text(PRESET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "PRESETS", presets)
        settings = {"batch_size": 4, "loss_rows": 3, "max_new_tokens": 3}
        patch.setattr(quickstart, "SETTINGS", {"general": settings, "maths": settings})
        patch.setattr(quickstart, "ROUTING_ROWS", 3)
        yield presets


def make_data(model: Path, data: Path) -> None:
    shutil.copytree(model, data / "model")
    for domain in ("general", "maths"):
        answer = {"answer": "3", "task": "sum"} if domain == "maths" else {}
        for split, count in (("train", 12), ("bench", 4)):
            rows = [row | {"domain": domain} | answer for row in make_rows(count, seed=len(split))]
            write_jsonl(data / f"{domain}.{split}.jsonl", rows)


def run(folders: Folders) -> dict[str, Any]:
    quickstart.main(["--data", str(folders[0]), "--out", str(folders[1])])
    return json.loads((folders[1] / "report.json").read_text(encoding="utf-8"))


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the quickstart calls what is costly, from now on."""
    calls = Counter[str]()
    for owner, name in (
        (train, "main"),
        (evaluate, "evaluate"),
        (quickstart, "routing_counts"),
        (evaluate, "load"),
    ):
        original = getattr(owner, name)

        def counted(*args, _name: str = name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.fixture(scope="module")
def first(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, Counter[str]]:
    """The folders of a first run, and what it called."""
    root = tmp_path_factory.mktemp("quickstart")
    make_data(tiny_model_dir, root / "data")
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        run((root / "data", root / "out"))
    return (root / "data", root / "out"), calls


@pytest.fixture
def finished(first: tuple[Folders, Counter[str]], tmp_path: Path) -> Folders:
    """A copy of that run, to change."""
    (data, out), _ = first
    return shutil.copytree(data, tmp_path / "data"), shutil.copytree(out, tmp_path / "out")


def test_first_run(first: tuple[Folders, Counter[str]]) -> None:
    (_, out), calls = first
    assert (calls["main"], calls["evaluate"], calls["routing_counts"]) == (2, 6, 2)
    written = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert list(written["results"]) == ["base", "stage1", "stage2"]
    for benches in written["results"].values():
        assert benches["maths"]["groups"]["maths/sum"]["asked"] == 4
        assert benches["general"]["groups"]["general"]["tokens"] > 3
    losses = [benches["general"]["groups"]["general"]["loss"] for benches in written["results"].values()]
    assert len(set(losses)) == 3  # each stage is another model
    shares = written["routing"]["share"]["maths"]
    assert len(shares) == len(written["routing"]["routers"]) == 6
    assert all(sum(row) == pytest.approx(1) for row in shares)
    assert (out / "routing.png").is_file()
    assert load(out / "stage2" / checkpoint.CONFIG).model_name == str(out / "stage1" / "final")


def test_second_run_only_reports(
    finished: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((finished[1] / "report.json").read_text(encoding="utf-8"))
    calls = count_calls(monkeypatch)
    after = run(finished)
    assert not calls
    for part in ("results", "routing", "seconds"):
        assert after[part] == before[part]
    assert "Stage 2: maths not acquired" in " ".join(capsys.readouterr().out.split())


def test_an_interrupted_stage_goes_on(finished: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(finished[1] / "stage2")
    save = checkpoint.save

    def interrupted(folder: Path, *args) -> None:
        save(folder, *args)
        if folder == finished[1] / "stage2" / "checkpoint-2":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(finished)
    monkeypatch.setattr(checkpoint, "save", save)
    steps: list[int] = []
    step = train.Trainer.train_step
    monkeypatch.setattr(train.Trainer, "train_step", lambda self, window: (steps.append(1), step(self, window))[1])
    run(finished)
    assert len(steps) == 2
    lines = (finished[1] / "stage2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_new_bench_is_measured_and_nothing_is_trained(finished: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = finished[0] / "maths.bench.jsonl"
    bench.write_text(bench.read_text().replace('"3"', '"4"'))
    calls = count_calls(monkeypatch)
    run(finished)
    assert (calls["main"], calls["evaluate"], calls["routing_counts"]) == (0, 3, 2)


def test_changed_inputs_of_a_trained_stage_are_refused(finished: Folders) -> None:
    before = (finished[1] / "report.json").read_bytes()
    write_jsonl(finished[0] / "maths.train.jsonl", make_rows(5))
    with pytest.raises(UserError, match="stage2: was trained from another model, preset or data"):
        run(finished)
    assert (finished[1] / "report.json").read_bytes() == before


def test_data_that_were_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model: missing; make it with: python -m molora\.prepare quickstart"):
        quickstart.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_presets_are_valid_and_follow_one_another() -> None:
    folder = Path(__file__).parents[2] / "configs" / "presets" / "quickstart"
    configs = [load(folder / preset) for preset, _ in quickstart.STAGES.values()]
    shapes = [config.injection.model_dump(exclude={"lora_dropout"}) for config in configs]
    assert shapes[0] == shapes[1]
    assert all(config.training.save_steps for config in configs)  # an interrupted quickstart resumes
