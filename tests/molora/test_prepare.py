"""Preparing models and data: the same bytes every time, disjoint splits, steps that reach their answers."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import SafetensorError

from molora import files
from molora.errors import UserError
from molora.prepare import general, maths, packages, quickstart, rows, smollm2, split
from molora.prepare.__main__ import main

pytest.importorskip("chatterbot_corpus", reason="needs the quickstart extra")
pytest.importorskip("reasoning_gym", reason="needs the quickstart extra")


@pytest.fixture(scope="module")
def chat_rows() -> tuple[list[rows.Row], list[rows.Row]]:
    return general.build(42)


@pytest.fixture(scope="module")
def maths_rows() -> tuple[list[rows.Row], list[rows.Row]]:
    return maths.build(42)


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is AI?", "what is  ai"), ("무엇이니?", "무엇 이니"), ("A_b", "ab"), ("x²", "X2")],
)
def test_same_question_written_differently(one: str, other: str) -> None:
    assert rows.question_key(one) == rows.question_key(other)


@pytest.mark.parametrize(("one", "other"), [("6 + 7 =", "6 - 7 ="), ("3 cats", "4 cats"), ("고양이", "강아지")])
def test_different_questions(one: str, other: str) -> None:
    assert rows.question_key(one) != rows.question_key(other)


def test_check_disjoint_catches_a_leak() -> None:
    with pytest.raises(UserError, match=r"1 questions are in both.*whatisai"):
        rows.check_disjoint([{"prompt": "What is AI?"}], [{"prompt": "what is ai"}])


def test_jsonl_round_trip(tmp_path: Path) -> None:
    written = [{"prompt": "안녕?", "response": "line one\nline two\u2028three"}, {"prompt": "b", "response": '"'}]
    rows.write_jsonl(tmp_path / "rows.jsonl", written)
    assert rows.read_jsonl(tmp_path / "rows.jsonl") == written
    assert b"\r" not in (tmp_path / "rows.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        (b'{"prompt": "a"}\n\n[1]\n', "line 3: expected an object"),
        (b"\n\n", "holds no rows"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000, "line 1: not JSON that can be read"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: not JSON that can be read"),
    ],
)
def test_bad_jsonl_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows.read_jsonl(tmp_path / "bad.jsonl")


def test_marks_that_windows_puts_before_a_line_are_read_past(tmp_path: Path) -> None:
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\xef\xbb\xbf{"prompt": "b"}\r\n')
    assert rows.read_jsonl(tmp_path / "marked.jsonl") == [{"prompt": "a"}, {"prompt": "b"}]


def test_half_a_character_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'half of a surrogate pair .* after …\{"prompt": "cut ;'):
        rows.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "cut \ud83d"}])
    assert not list(tmp_path.iterdir())


# --- general ------------------------------------------------------------------------------------------------------


def test_general_rows(chat_rows: tuple[list[rows.Row], list[rows.Row]]) -> None:
    train, bench = chat_rows
    for row in train + bench:
        assert list(row) == ["prompt", "response", "domain"]
        assert 0 < len(row["prompt"]) <= general.MAX_CHARS and 0 < len(row["response"]) <= general.MAX_CHARS
        korean = [re.search("[가-힣]", row[key]) is not None for key in ("prompt", "response")]
        assert korean == [row["domain"] == "general-ko"] * 2, row
    for domain, at_least in (("general-en", (600, 100)), ("general-ko", (350, 60))):
        counts = [sum(row["domain"] == domain for row in split) for split in (train, bench)]
        assert counts[0] >= at_least[0] and counts[1] >= at_least[1], (domain, counts)


def test_general_split_is_by_question(chat_rows: tuple[list[rows.Row], list[rows.Row]]) -> None:
    train, bench = chat_rows
    questions = [{rows.question_key(row["prompt"]) for row in split} for split in (train, bench)]
    assert not questions[0] & questions[1]
    assert len(questions[1]) == len(bench), "the bench counts each question once"
    pairs = [(row["prompt"], row["response"]) for row in train]
    assert len(set(pairs)) == len(pairs)


def test_general_takes_alternatives_but_not_later_turns(chat_rows: tuple[list[rows.Row], list[rows.Row]]) -> None:
    pairs = {(row["prompt"], row["response"]) for split in chat_rows for row in split}
    assert ("What is your fear", "The off switch.") in pairs  # emotion: the second answer to the first line
    assert ("How is your health?", "why?") not in pairs  # health: the third turn of a dialogue
    assert ("do you know chemistry", "what is chemistry") not in pairs  # a redirection


def test_clean() -> None:
    assert general.clean(" WHAT IS\n  SOCCER ") == "What is soccer"
    assert general.clean("OS라고 합니다") == "OS라고 합니다"
    assert general.clean("'quoted'") == "quoted"
    assert general.clean("Squirrels\xa0") == "Squirrels"


# --- maths --------------------------------------------------------------------------------------------------------


def test_maths_rows(maths_rows: tuple[list[rows.Row], list[rows.Row]]) -> None:
    train, bench = maths_rows
    for part, size in ((train, maths.TRAIN_ROWS), (bench, maths.BENCH_ROWS)):
        assert {task: sum(row["task"] == task for row in part) for task in maths.TASKS} == dict.fromkeys(
            maths.TASKS, size
        )
        for row in part:
            assert list(row) == ["prompt", "response", "answer", "task", "domain"]
            assert row["domain"] == "maths"
    questions = [{rows.question_key(row["prompt"]) for row in part} for part in (train, bench)]
    assert not questions[0] & questions[1]
    assert len(questions[0]) == len(train) and len(questions[1]) == len(bench), "no question is there twice"


def test_every_written_step_is_true_and_the_chain_is_unbroken(
    maths_rows: tuple[list[rows.Row], list[rows.Row]],
) -> None:
    """Read the response as a pupil's paper: each equation holds, and each total continues the one before."""
    for row in maths_rows[0][:600] + maths_rows[1]:
        *lines, last = row["response"].split("\n")
        total = None
        for line in lines:
            equations = re.findall(r"(-?\d+)([-+*])(\d+)=(-?\d+)", re.sub(r"(\d+) [a-z ]+", r"\1", line))
            assert equations, line
            for left, sign, right, result in equations:
                worked = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
                assert worked == int(result), line
            if total is not None:
                assert equations[-1][0] == total, row["response"]
            total = equations[-1][3]
        assert last == f"The answer is {total}." and total == row["answer"]


def test_worked_example() -> None:
    item = {
        "question": "…1 cow, 8 sea slugs, 13 spiders?\n",
        "answer": "108",
        "metadata": {"animals": {"cow": 1, "sea slug": 8, "spider": 13}},
    }
    assert maths.row_of("leg_counting", item)["response"].split("\n") == [
        "1 cow*4=4",
        "8 sea slugs*0=0, 4+0=4",
        "13 spiders*8=104, 4+104=108",
        "The answer is 108.",
    ]


@pytest.mark.parametrize("task", maths.TASKS)
@pytest.mark.parametrize("stream", [0, 1, 85, 2**20])
def test_steps_reach_the_answer_for_any_seed(task: str, stream: int) -> None:
    drawn = list(itertools.islice(maths.stream_rows(task, stream), 100))  # row_of asserts each against its item
    assert all(row["response"].endswith(f"The answer is {row['answer']}.") for row in drawn)


def test_wrong_steps_are_caught() -> None:
    item = {"question": "1 + 1 =", "answer": "3", "metadata": {"expression": "1 + 1"}}
    with pytest.raises(AssertionError, match="the steps reach 2, the answer is 3"):
        maths.row_of("chain_sum", item)


def test_streams_do_not_overlap() -> None:
    """Item i is drawn from Random(seed + i), so neighbouring streams must be further apart than their length."""
    first = {row["prompt"] for row in itertools.islice(maths.stream_rows("leg_counting", 84), 300)}
    second = {row["prompt"] for row in itertools.islice(maths.stream_rows("leg_counting", 85), 300)}
    assert not first & second


def test_math_verify_reads_the_answer(maths_rows: tuple[list[rows.Row], list[rows.Row]]) -> None:
    math_verify = pytest.importorskip("math_verify", reason="needs the quickstart extra")
    signs = set()
    for row in maths_rows[1]:
        gold, parsed = math_verify.parse(row["answer"]), math_verify.parse(row["response"])
        assert math_verify.verify(gold, parsed), row["response"]
        assert not math_verify.verify(math_verify.parse(str(int(row["answer"]) + 1)), parsed)
        signs.add(int(row["answer"]) < 0)
    assert signs == {True, False}, "negative answers are among them"


# --- quickstart -----------------------------------------------------------------------------------------------------


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Quickstart with a stand-in for the model, which takes 20 seconds; returns the exports made."""
    exports: list[Path] = []

    def export(target: Path) -> None:
        exports.append(target)
        with files.replacing(target) as folder:
            folder.mkdir()
            (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "export", export)
    return exports


def run_quickstart(out: Path, seed: int = 42) -> str:
    """What quickstart prints."""
    printed = io.StringIO()
    quickstart.prepare(out, seed, Console(file=printed, width=120))
    return printed.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DATA_FILES = ["general.bench.jsonl", "general.train.jsonl", "maths.bench.jsonl", "maths.train.jsonl"]


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path, without_model: list[Path]) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_quickstart(tmp_path / name, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert sorted(a) == [*DATA_FILES[:2], "manifest.json", *DATA_FILES[2:], "model/config.json"]
    assert all(a[name] != c[name] for name in DATA_FILES)


def test_second_run_reuses_everything(tmp_path: Path, without_model: list[Path]) -> None:
    run_quickstart(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run_quickstart(tmp_path).count("up to date") == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    assert len(without_model) == 1


def test_manifest_describes_the_files(tmp_path: Path, without_model: list[Path]) -> None:
    run_quickstart(tmp_path, seed=7)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for part in ("model", "general", "maths"):
        for name, described in manifest[part]["files"].items():
            assert described["sha256"] == files.file_sha256(tmp_path / name)
            if name.endswith(".jsonl"):
                assert described["rows"] == sum(described["counts"].values()) == len(rows.read_jsonl(tmp_path / name))
    assert manifest["maths"]["recipe"]["seed"] == 7
    assert manifest["maths"]["recipe"]["tasks"]["chain_sum"]["max_terms"] == 4


def test_only_what_differs_is_built_again(
    tmp_path: Path, without_model: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_quickstart(tmp_path)
    before = contents(tmp_path)

    (tmp_path / "maths.bench.jsonl").write_text("damaged")
    printed = run_quickstart(tmp_path)
    assert "maths: maths.bench.jsonl was changed since" in printed and printed.count("up to date") == 2
    assert contents(tmp_path) == before

    (tmp_path / "model" / "config.json").unlink()
    assert "model: model/config.json is missing" in run_quickstart(tmp_path)
    assert contents(tmp_path) == before

    printed = run_quickstart(tmp_path, seed=43)
    assert "general: made with another seed" in printed and "model: up to date" in printed

    monkeypatch.setattr(quickstart, "GENERATOR", quickstart.GENERATOR + 1)
    assert run_quickstart(tmp_path, seed=43).count("made with another generator") == 3


def test_files_of_others_are_not_overwritten(tmp_path: Path, without_model: list[Path]) -> None:
    (tmp_path / "general.train.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"holds general\.train\.jsonl.*another --out"):
        run_quickstart(tmp_path)
    assert (tmp_path / "general.train.jsonl").read_text() == "mine"


@pytest.mark.parametrize("damage", ["{", "[]", '{"model": 3}', "\ud800".encode("utf-8", "surrogatepass")])
def test_damaged_manifest_is_explained(tmp_path: Path, without_model: list[Path], damage: str | bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
        run_quickstart(tmp_path)


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run_quickstart(tmp_path / "file")


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "target"
    files.write_text(target, "old")
    with pytest.raises(RuntimeError), files.replacing(target) as new:
        new.write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == {"target": b"old"}
    with pytest.raises(UserError, match="target: cannot be written"), files.replacing(target):
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match=r"target: cannot be written.*No space left"), files.replacing(target):
        raise SafetensorError("I/O error: No space left on device")
    assert contents(tmp_path) == {"target": b"old"} and len(list(tmp_path.iterdir())) == 1


def test_replacing_a_folder(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with files.replacing(tmp_path / "folder") as folder:
            folder.mkdir()
            (folder / content).write_text("")
    assert list(contents(tmp_path)) == ["folder/new"]
    with pytest.raises(UserError, match="folder: cannot be written"), files.replacing(tmp_path / "folder"):
        pass  # nothing is there to take its place
    assert list(contents(tmp_path)) == ["folder/new"]


@pytest.mark.parametrize(
    "command",
    [
        "mix absent.jsonl --overwrite --out",
        "convert absent.jsonl --overwrite --out",
        "openr1-math --source absent --overwrite --out",
        "openr1-math --source absent --overwrite --bench",
        "general-en-ko --en absent --overwrite --out",
        "check absent.jsonl --tokenizer absent --picture",
    ],
)
def test_a_folder_is_not_replaced_by_a_file(command: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder.png"
    files.write_text(folder / "run", "")
    with pytest.raises(UserError, match="is a folder"):  # and not that the input is absent: before anything is read
        main([*command.split(), str(folder)])
    with pytest.raises(UserError, match="is a folder"):
        files.write_text(folder, "")
    assert list(contents(tmp_path)) == ["folder.png/run"]


def test_missing_or_other_package_names_the_command() -> None:
    with pytest.raises(UserError, match=r"not installed; install it with: pip install --no-deps absent==1\.0$"):
        packages.package_folder("absent_package", "absent==1.0", "--no-deps")
    with pytest.raises(UserError, match=r"has version 1\.3\.3, 9\.9 is needed.*pip install chatterbot-corpus==9\.9$"):
        packages.package_folder("chatterbot_corpus", "chatterbot-corpus==9.9")


# --- the model --------------------------------------------------------------------------------------------------------


def test_tampered_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "package_folder", lambda *_: tmp_path)
    with pytest.raises(UserError, match="lacks this file; install it again"):
        smollm2.export(tmp_path / "model")
    (tmp_path / smollm2.GGUF_FILE).write_bytes(b"GGUF, but not that one")
    with pytest.raises(UserError, match=r"not the file that was published.*pip install --force-reinstall --no-deps"):
        smollm2.export(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_exported_model_answers(tmp_path: Path) -> None:
    """The real thing, 30 seconds: bf16, tied, its tokenizer faithful after a reload, and it knows Paris."""
    pytest.importorskip("gguf")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    smollm2.export(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    smollm2.check_tokenizer(tokenizer)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert output[-1] == tokenizer.eos_token_id, "the answer ends"
    assert "Paris" in tokenizer.decode(output)


# --- command line ---------------------------------------------------------------------------------------------------


def test_quickstart_command(tmp_path: Path, without_model: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(["quickstart", "--out", str(tmp_path), "--seed", "3"])
    assert "general.bench.jsonl" in capsys.readouterr().out
    with pytest.raises(UserError, match="must not be negative"):
        main(["quickstart", "--out", str(tmp_path), "--seed", "-1"])
    with pytest.raises(SystemExit, match="2"):
        main(["quickstart", "--sede", "3"])


def test_mix_keeps_rows_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out, again = (tmp_path / f"{name}.jsonl" for name in ("a", "b", "out", "again"))
    rows.write_jsonl(a, [{"prompt": str(i), "response": "x", "domain": "general-en"} for i in range(30)])
    rows.write_jsonl(b, [{"prompt": str(i), "response": "y", "domain": "maths", "answer": "1"} for i in range(20)])
    main(["mix", str(a), str(b), "--out", str(out)])
    assert "50 rows (30 general-en, 20 maths)" in capsys.readouterr().out
    mixed, given = rows.read_jsonl(out), rows.read_jsonl(a) + rows.read_jsonl(b)
    assert mixed != given and sorted(map(json.dumps, mixed)) == sorted(map(json.dumps, given))

    main(["mix", str(a), str(b), "--out", str(again)])
    assert again.read_bytes() == out.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        main(["mix", str(a), "--out", str(out)])
    main(["mix", str(a), "--out", str(out), "--overwrite", "--seed", "1"])
    assert len(rows.read_jsonl(out)) == 30
    with pytest.raises(UserError, match="no such file"):
        main(["mix", str(tmp_path / "absent.jsonl"), "--out", str(tmp_path / "new.jsonl")])
    assert not (tmp_path / "new.jsonl").exists()


def test_mix_holds_a_bench_out(tmp_path: Path) -> None:
    given = [{"prompt": f"What is {i % 30} + 1?", "response": str(i)} for i in range(90)]
    given += [{"messages": [{"role": "user", "content": "what is 3+1"}, {"role": "assistant", "content": "4"}]}]
    mine, out, bench = (tmp_path / f"{name}.jsonl" for name in ("mine", "out", "bench"))
    rows.write_jsonl(mine, given)
    main(["mix", str(mine), "--out", str(out), "--bench", str(bench), "--bench-rows", "10"])
    asked, trained = ([rows.question_key(split.question(row)) for row in rows.read_jsonl(p)] for p in (bench, out))
    assert len(asked) == len(set(asked)) == 10 and not set(asked) & set(trained)
    assert len(trained) == sum(rows.question_key(split.question(row)) not in asked for row in given)

    again = tmp_path / "again.jsonl"
    for wrong, why in (
        (["--bench", str(again), "--bench-rows", "30"], "below 30"),
        (["--bench", str(again), "--bench-rows", "0"], "at least 1"),
        (["--bench-rows", "3"], "give both"),
        (["--bench", str(bench)], "exists already"),
        (["--bench", str(tmp_path / "new.jsonl")], "new.jsonl"),
    ):
        with pytest.raises(UserError, match=why):
            main(["mix", str(mine), "--out", str(tmp_path / "new.jsonl"), *wrong])
    assert not again.exists()
    rows.write_jsonl(mine, [{"question": "1 + 1?"}, {"question": "1 + 2?"}])
    with pytest.raises(UserError, match="no messages, prompt or text"):
        main(["mix", str(mine), "--out", str(tmp_path / "new.jsonl"), "--bench", str(again)])


@pytest.mark.parametrize("command", ["mix", "convert"])
def test_what_is_read_is_not_replaced(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows.write_jsonl(Path("rows.jsonl"), [{"prompt": "a", "response": "b"}])
    before = Path("rows.jsonl").read_bytes()
    with pytest.raises(UserError, match="is read here"):
        main([command, "rows.jsonl", "--overwrite", "--out", str(tmp_path / "rows.jsonl")])
    assert Path("rows.jsonl").read_bytes() == before


def test_mix_takes_a_ratio_without_repeating_rows(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "mixed.jsonl"
    rows.write_jsonl(a, [{"prompt": str(i), "domain": "a"} for i in range(50)])
    rows.write_jsonl(b, [{"prompt": str(i), "domain": "b"} for i in range(40)])
    for options, counts in ((["--ratio", "4:1"], (50, 12)), (["--ratio", "1:1", "--rows", "21"], (10, 10))):
        main(["mix", str(a), str(b), "--out", str(out), "--overwrite", *options])
        mixed = [json.dumps(row) for row in rows.read_jsonl(out)]
        assert tuple(sum(f'"{name}"' in row for row in mixed) for name in "ab") == counts
        assert len(set(mixed)) == len(mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "1:2:3"], "write 2 positive numbers"),
        (["--ratio", "1:0"], "write 2 positive numbers"),
        (["--ratio", "1/2"], "write 2 positive numbers"),
        (["--rows", "3"], "give both"),
        (["--rows", "0"], "give both"),
        (["--ratio", "1:1", "--rows", "1"], "at least one a file"),
    ],
)
def test_mix_explains_a_bad_ratio(options: list[str], message: str, tmp_path: Path) -> None:
    rows.write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    with pytest.raises(UserError, match=message):
        main(["mix", *[str(tmp_path / "a.jsonl")] * 2, "--out", str(tmp_path / "out.jsonl"), *options])
