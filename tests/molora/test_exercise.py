"""The exercise on a tiny random model: equal tokens, equal parameters, nothing done twice, an honest page."""

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from conftest import make_rows, write_jsonl
from molora import checkpoint, data, evaluate, train
from molora.config import load
from molora.errors import UserError
from molora.exercise import __main__ as exercise
from molora.exercise.comparison import Comparison, Trained
from molora.exercise.plan import LORA, ONE, TWO, Way, plan, rank_for, trainable
from molora.pipeline import training_tokens
from molora.scores import BenchResult, Score

PRESET = """
model_name: {model}
injection: {{num_experts: 4, top_k: 2, lora_r: 2, lora_alpha: 4}}
training:
  step_unit: {unit}
  grad_accum_steps: {accumulate}
  max_train_steps: {steps}
  batch_size: 2
  lr: 0.01
  log_steps: 1
  phases: {phases}
data: {{path: {data}, max_length: {length}, packing: {packing}}}
"""
WARM_UP = "[{step: 0, trainable: [router]}, {step: 2, trainable: [router, lora, attn_lora]}]"
ALL = "[{step: 0, trainable: [router, lora, attn_lora]}]"


def make_setting(model: Path, folder: Path, *, packing: bool = True, unit: str = "optimizer") -> list[str]:
    """Presets, rows and benches in ``folder``; the arguments that name them."""
    names = ("general", "maths")
    for i, (name, steps, phases) in enumerate(zip(names, (4, 6), (WARM_UP, ALL), strict=True)):
        rows = [row | {"domain": name} for row in make_rows(40, seed=i)]
        write_jsonl(folder / f"{name}.train.jsonl", rows)
        answer = {"answer": "3", "task": "sum"} if name == "maths" else {}
        write_jsonl(folder / f"{name}.bench.jsonl", [row | answer for row in rows[:4]])
        values = {"model": model, "unit": unit, "steps": steps, "phases": phases, "length": 48 + 16 * i}
        values |= {"accumulate": 2 if unit == "micro" else 1, "packing": str(packing).lower()}
        values |= {"data": [str(folder / f"{one}.train.jsonl") for one in names[: i + 1]]}
        (folder / f"{i + 1}.yml").write_text(PRESET.format(**values))
    arguments = [f"--{name}={folder / name}.bench.jsonl" for name in names]
    arguments += [f"--preset-{n}={folder / f'{n}.yml'}" for n in (1, 2)]
    return [*arguments, "--max-new-tokens=3", "--batch-size=4", f"--out={folder / 'out'}"]


@pytest.fixture(scope="module")
def first(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run with one seed, and its arguments."""
    folder = tmp_path_factory.mktemp("exercise")
    arguments = make_setting(tiny_model_dir, folder)
    exercise.main([*arguments, "--seeds", "1"])
    return folder, arguments


def test_first_run(first: tuple[Path, list[str]]) -> None:
    out = first[0] / "out"
    written = json.loads((out / "exercise.json").read_text(encoding="utf-8"))
    ways = written["ways"]
    assert list(ways) == [TWO, ONE, LORA]
    read = [way["tokens"][0] for way in ways.values()]
    assert read[0] == read[2]
    longest_step = 2 * 64
    assert abs(read[1] - read[0]) <= longest_step / 2
    assert ways[TWO]["trainable_parameters"] == ways[ONE]["trainable_parameters"]
    losses = [way["stages"][-1]["general"][0]["groups"]["general"]["loss"] for way in ways.values()]
    assert len(set(losses)) == 3
    assert [way["verdict"] is not None for way in ways.values()] == [True, False, True]
    assert ways[LORA]["against_two_stages"]["general"]["general"]["loss"]["value"] == pytest.approx(
        losses[2] - losses[0]
    )
    page = (out / "exercise.md").read_text(encoding="utf-8")
    assert f"{ways[LORA]['trainable_parameters']:,}" in page and "One seed" in page and "{" not in page
    assert (out / "exercise.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_parameters_are_those_of_the_adapters_trained(first: tuple[Path, list[str]]) -> None:
    written = json.loads((first[0] / "out" / "exercise.json").read_text(encoding="utf-8"))
    for way, run in ((TWO, "stage2"), (ONE, "mixed"), (LORA, "stage1")):
        weights = load_file(first[0] / "out" / way / "seed-1" / run / "final" / "adapter.safetensors")
        assert sum(tensor.numel() for tensor in weights.values()) == written["ways"][way]["trainable_parameters"]
        assert any("router" in name for name in weights) == (way != LORA)
    mixture, lora = (written["ways"][way] for way in (TWO, LORA))
    per_rank = lora["trainable_parameters"] / lora["rank"]
    assert abs(lora["trainable_parameters"] - mixture["trainable_parameters"]) <= per_rank / 2


def test_the_control_differs_in_nothing_but_its_shape_and_the_router(first: tuple[Path, list[str]]) -> None:
    out = first[0] / "out"
    for stage in ("stage1", "stage2"):
        mixture, lora = (load(out / way / "seed-1" / stage / checkpoint.CONFIG).model_dump() for way in (TWO, LORA))
        scaling = [config["injection"]["lora_alpha"] / config["injection"]["lora_r"] for config in (mixture, lora)]
        assert scaling[0] == scaling[1]
        assert lora["training"]["phases"] == [{"step": 0, "trainable": ["lora", "attn_lora"]}]
        for config in (mixture, lora):
            del config["model_name"], config["training"]["phases"]
            del config["injection"]["lora_r"], config["injection"]["lora_alpha"]
        assert mixture["injection"].pop("strategy") == "mixture_lora"
        assert lora["injection"].pop("strategy") == "dense_lora"
        assert mixture == lora
    assert load(out / LORA / "seed-1" / "stage2" / checkpoint.CONFIG).model_name == str(
        out / LORA / "seed-1/stage1/final"
    )


def test_a_second_seed_trains_itself_alone(first: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, arguments = first
    calls = Counter[str]()
    for owner, name in ((train, "main"), (evaluate, "evaluate")):
        original = getattr(owner, name)

        def counted(*args, _name: str = name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    before = json.loads((folder / "out" / "exercise.json").read_text(encoding="utf-8"))
    exercise.main([*arguments, "--seeds", "1", "2"])
    assert calls == {"main": 5, "evaluate": 10}
    after = json.loads((folder / "out" / "exercise.json").read_text(encoding="utf-8"))
    for way in (TWO, ONE, LORA):
        stages = [run["ways"][way]["stages"][-1]["general"] for run in (before, after)]
        assert stages[0][0] == stages[1][0] and stages[1][0] != stages[1][1]
    assert "2 seeds: mean" in (folder / "out" / "exercise.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("packing", "unit"), [(False, "optimizer"), (True, "micro")])
def test_the_mixed_rows_are_those_that_the_stages_read(
    packing: bool, unit: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    make_setting(tiny_model_dir, tmp_path, packing=packing, unit=unit)
    made = plan([(tmp_path / "1.yml", []), (tmp_path / "2.yml", [])], 3, tmp_path / "out")
    read = Counter[str]()
    for run in made.ways[TWO].runs:
        trainer = train.Trainer(
            run.config(str(tiny_model_dir)), tmp_path / "never", data.read_rows(run.config("x").data.path)
        )
        for window in trainer.windows():
            read.update(where for batch in window for wheres in batch.where for where in wheres.split(", "))
    rows = {
        row["where"]: row["prompt"]
        for name in ("general", "maths")
        for row in data.read_rows(tmp_path / f"{name}.train.jsonl")
    }
    mixed = data.read_rows(tmp_path / "out" / ONE / "seed-3" / "mixed.jsonl")
    assert Counter(row["prompt"] for row in mixed) == Counter(rows[where] for where in read.elements())
    assert {row["domain"] for row in mixed} == {"general", "maths"}
    run = made.ways[ONE].runs[0]
    trainer = train.Trainer(run.config(str(tiny_model_dir)), tmp_path / "never", mixed)
    assert sum(batch.tokens for window in trainer.windows() for batch in window) == made.ways[ONE].tokens


def test_tokens_of_a_run_by_its_log(first: tuple[Path, list[str]]) -> None:
    out = first[0] / "out"
    made = plan([(first[0] / "1.yml", []), (first[0] / "2.yml", [])], 1, out)
    for way in made.ways.values():
        assert sum(training_tokens(out / run.name) for run in way.runs) == way.tokens


def test_the_rank_that_comes_closest(tiny_model_dir: Path) -> None:
    base = AutoConfig.from_pretrained(tiny_model_dir)
    groups = {"router", "lora", "attn_lora"}
    config = load(None, ["injection.lora_r=3", "injection.num_experts=4"])
    wanted = trainable(config, base, groups)
    rank = rank_for(wanted, config, base, groups)

    def dense(rank: int) -> int:
        return trainable(load(None, ["injection.strategy=dense_lora", f"injection.lora_r={rank}"]), base, groups)

    assert min(range(1, 20), key=lambda r: abs(dense(r) - wanted)) == rank
    assert trainable(config, base, {"lora"}) < wanted


def result(loss: float, correct: int | None = None, rows: int = 50) -> BenchResult:
    right = [None if correct is None else i < correct for i in range(rows)]
    return BenchResult(tuple(Score(("all",), loss * 10, 10, "", c) for c in right), None, None)


def test_findings_say_better_worse_and_nothing_to_see() -> None:
    def trained(*stages: tuple[float, int]) -> Trained:
        of = [{"general": [result(loss)], "maths": [result(1.0, correct)]} for loss, correct in stages]
        return Trained(Way((), 1, 1, 1, 1), of, [1], [1.0])

    ways = {TWO: trained((2.0, 5), (2.0, 20)), ONE: trained((2.5, 40)), LORA: trained((2.0, 5), (1.9, 21))}
    compared = Comparison([42], {"general": result(3.0), "maths": result(1.0, 2)}, ways)
    one, lora, verdict, _ = compared.findings()
    assert "general loss +0.5000 (+0.5000 to +0.5000): worse" in one
    assert "maths exact match +40.0" in one and "points: better" in one
    assert "general loss -0.1000 (-0.1000 to -0.1000): better" in lora
    assert "points: no difference that these rows show" in lora
    assert "general ability kept" in verdict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set-2", "injection.strategy=dense_lora"], "give mixture_lora"),
        (["--set-2", "data.path=null"], "data.path is missing"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--maths", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--set-1", "model_name=./nowhere"], "no folder './nowhere'"),
    ],
)
def test_refused_before_anything_is_trained(
    change: list[str], message: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        exercise.main([*make_setting(tiny_model_dir, tmp_path), *change])
    assert not (tmp_path / "out" / TWO).exists()


def test_dry_run_trains_nothing(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exercise.main([*make_setting(tiny_model_dir, tmp_path), "--dry-run"])
    assert "one LoRA, two stages" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("final"))
