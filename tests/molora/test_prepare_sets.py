"""Data sets of the hub as files of ours: the real ``datasets`` library on small sets of the same schema, on disk."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molora.answers import is_correct
from molora.config import Data
from molora.data import encode_rows, read_rows
from molora.errors import UserError
from molora.prepare import check, general_en_ko, hub, openr1_math
from molora.prepare.__main__ import main
from molora.prepare.rows import question_key
from tests.conftest import make_tokenizer

datasets = pytest.importorskip("datasets", reason="needs the data extra")
pytest.importorskip("math_verify", reason="needs the quickstart extra")

# The schema on the set's page, with the flags beside the generations and the lists that may be null.
OPENR1 = {
    "problem": datasets.Value("string"),
    "solution": datasets.Value("string"),
    "answer": datasets.Value("string"),
    "problem_type": datasets.Value("string"),
    "question_type": datasets.Value("string"),
    "source": datasets.Value("string"),
    "uuid": datasets.Value("string"),
    "is_reasoning_complete": datasets.List(datasets.Value("bool")),
    "generations": datasets.List(datasets.Value("string")),
    "correctness_math_verify": datasets.List(datasets.Value("bool")),
    "correctness_llama": datasets.List(datasets.Value("bool")),
    "finish_reasons": datasets.List(datasets.Value("string")),
    "correctness_count": datasets.Value("int64"),
    "messages": datasets.List({"content": datasets.Value("string"), "role": datasets.Value("string")}),
}


def generation(answer: str, detour: str = "") -> str:
    return f"<think>\nHmm, perhaps 7. {detour}\n</think>\n\nAdding {detour}gives \\(\\boxed{{{answer}}}\\)."


def problem(text: str, answer: str, generations: list[tuple[str, bool, bool]], **others: Any) -> dict[str, Any]:
    """An item of OpenR1-Math; a generation is (text, complete, found right by rules)."""
    texts, complete, right = ([one[i] for one in generations] for i in range(3))
    return {
        "problem": text,
        "solution": f"The answer is {answer}.",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": text,
        "is_reasoning_complete": complete,
        "generations": texts,
        "correctness_math_verify": right,
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": sum(map(bool, right)),
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": texts[0] if texts else ""}],
    } | others


GOOD = [problem(f"What is {i} + {i}?", str(2 * i), [(generation(str(2 * i)), True, True)]) for i in range(20)]
BAD = {
    "no complete and verified generation": [
        problem("Wrong?", "3", [(generation("4"), True, False)]),
        problem("Cut?", "3", [("<think>\nHmm, 3", False, True)]),
        problem("None?", "3", []),
    ],
    "answer that math-verify cannot read": [problem("Prove it.", "proof", [(generation("proof"), True, True)])],
    "without problem or answer": [problem("Empty?", "", [(generation("3"), True, True)])],
    "response in which the answer is not found": [problem("Mislabelled?", "5", [(generation("4"), True, True)])],
    "question seen before": [problem("what is  3+3", "6", [(generation("6"), True, True)])],
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def openr1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the set as ``hf download --local-dir`` leaves it: parquet files and a card that names them."""
    folder = tmp_path_factory.mktemp("openr1")
    items = GOOD + [item for bad in BAD.values() for item in bad]
    rows = datasets.Dataset.from_list(items, features=datasets.Features(OPENR1))
    (folder / "data").mkdir()
    rows.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )
    return folder


def openr1_command(source: Path | str, out: Path, *more: str) -> list[str]:
    paths = ["--out", str(out / "train.jsonl"), "--bench", str(out / "bench.jsonl")]
    return ["openr1-math", "--source", str(source), *paths, "--train-rows", "14", "--bench-rows", "4", *more]


# --- openr1-math ---------------------------------------------------------------------------------------------------


def test_openr1_rows_are_verified_disjoint_and_readable(openr1: Path, tmp_path: Path) -> None:
    main(openr1_command(openr1, tmp_path))
    train, bench = (read_rows(tmp_path / f"{name}.jsonl") for name in ("train", "bench"))
    assert (len(train), len(bench)) == (14, 4)
    known = {question_key(item["problem"]) for item in GOOD}
    keys = [question_key(row["prompt"]) for row in train + bench]
    assert set(keys) <= known and len(set(keys)) == 18
    for row in train + bench:
        assert row["domain"] == "maths" and is_correct(row["answer"], row["response"])
        assert "think>" not in row["response"]
    manifest = json.loads((tmp_path / "train.manifest.json").read_text())
    assert manifest["sources"][0]["set"] == openr1_math.NAME
    assert manifest["sources"][0]["sha256"].keys() == {"data/train-00000-of-00001.parquet"}
    assert manifest["recipe"]["seed"] == 42


def test_openr1_says_what_it_leaves_out(openr1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"20 usable rows, 30 to train on and 4 .*lower --train-rows") as error:
        main(openr1_command(openr1, tmp_path, "--train-rows", "30"))
    for reason, items in BAD.items():
        assert f"{len(items)} {reason}" in str(error.value)
    assert not list(tmp_path.glob("*.jsonl"))


def test_openr1_same_seed_same_bytes(openr1: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        main(openr1_command(openr1, tmp_path / name, "--seed", seed))
    one, again, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


def test_openr1_trace_is_the_whole_of_the_shortest_right_generation() -> None:
    item = problem("What?", "4", [(generation("4", "slowly "), True, True), (generation("4"), True, True)])
    row = openr1_math.row_of(item, "trace")
    assert isinstance(row, dict) and row["response"] == generation("4")
    row = openr1_math.row_of(item, "write-up")
    assert isinstance(row, dict) and row["response"] == "Adding gives \\(\\boxed{4}\\)."


def test_openr1_leaves_out_what_training_would_cut(openr1: Path, tmp_path: Path) -> None:
    make_tokenizer(chat_template=None, bos=True).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="longer than --max-length"):
        main(openr1_command(openr1, tmp_path, "--tokenizer", str(tmp_path / "model"), "--max-length", "8"))
    with pytest.raises(UserError, match="go together"):
        main(openr1_command(openr1, tmp_path, "--max-length", "8"))


def test_second_run_needs_no_source(openr1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(openr1_command(openr1, tmp_path))
    before = (tmp_path / "train.jsonl").stat().st_mtime_ns
    hidden = openr1.rename(openr1.with_name("hidden"))
    try:
        main(openr1_command(openr1, tmp_path))
    finally:
        hidden.rename(openr1)
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "train.jsonl").stat().st_mtime_ns == before
    (tmp_path / "bench.jsonl").write_text("mine")
    for changed in ([], ["--seed", "7"]):
        with pytest.raises(UserError, match="made otherwise, or changed since"):
            main(openr1_command(openr1, tmp_path, *changed))
    assert (tmp_path / "bench.jsonl").read_text() == "mine"
    main(openr1_command(openr1, tmp_path, "--overwrite"))
    assert len(read_rows(tmp_path / "bench.jsonl")) == 4


# --- general-en-ko -------------------------------------------------------------------------------------------------


def conversations(language: str) -> list[dict[str, Any]]:
    texts = {"en": ("What is {}?", "It is the number {}."), "ko": ("{}은 무엇입니까?", "{}은 숫자입니다.")}[language]
    rows = [
        [{"role": "user", "content": texts[0].format(i)}, {"role": "assistant", "content": texts[1].format(i)}]
        for i in range(12)
    ]
    rows[0].insert(0, {"role": "system", "content": "Be brief."})
    rows[1] += [{"role": "user", "content": "Thanks!"}]
    bad = [
        [{"role": "user", "content": "x?"}],
        [{"role": "user", "content": "x?"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": "x?"}, {"role": "assistant", "content": "\\boxed{2}"}],
        [{"role": "user", "content": "x?"}, {"role": "assistant", "content": "한국어" if language == "en" else "no"}],
    ]
    items: list[dict[str, Any]] = [{"messages": messages} for messages in rows + bad]
    if language == "en":
        items = [item | {"source": "smol-magpie-ultra-short"} for item in items]
        items.append({"messages": rows[2], "source": "metamathqa-50k"})
    return items


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("chats")
    for language in ("en", "ko"):
        datasets.Dataset.from_list(conversations(language)).to_parquet(folder / f"{language}.parquet")
    return {language: folder / f"{language}.parquet" for language in ("en", "ko")}


def general_command(chats: dict[str, Path], out: Path, *more: str) -> list[str]:
    sources = ["--en", str(chats["en"]), "--ko", str(chats["ko"])]
    paths = ["--out", str(out / "train.jsonl"), "--bench", str(out / "bench.jsonl")]
    return ["general-en-ko", *sources, *paths, "--train-rows", "15", "--bench-rows", "5", *more]


def test_general_rows_are_half_english_half_korean(chats: dict[str, Path], tmp_path: Path) -> None:
    main(general_command(chats, tmp_path))
    train, bench = (read_rows(tmp_path / f"{name}.jsonl") for name in ("train", "bench"))
    assert Counter(row["language"] for row in train) == {"en": 8, "ko": 7}
    assert Counter(row["language"] for row in bench) == {"en": 3, "ko": 2}
    asked = [question_key(general_en_ko.split.question(row)) for row in train + bench]
    assert len(set(asked)) == 20
    assert all(row["domain"] == "general" for row in train + bench)
    assert encode_rows(make_tokenizer(chat_template=None, bos=True), train, 512).dropped == 0
    manifest = json.loads((tmp_path / "train.manifest.json").read_text())
    assert [source["set"] for source in manifest["sources"]] == list(general_en_ko.SETS.values())


def test_a_single_row_is_english(chats: dict[str, Path], tmp_path: Path) -> None:
    main(general_command(chats, tmp_path, "--train-rows", "1", "--bench-rows", "1"))
    for name in ("train", "bench"):
        assert [row["language"] for row in read_rows(tmp_path / f"{name}.jsonl")] == ["en"]


@pytest.mark.parametrize("option", ["--train-rows", "--bench-rows", "--max-length"])
def test_counts_below_one_say_so(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["openr1-math", option, "0"])
    assert f"argument {option}: 0: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("language", "reasons"),
    [
        ("en", ["without an answer", "without response", "with LaTeX", "answered in another language", "a maths set"]),
        ("ko", ["without an answer", "without response", "with LaTeX", "answered in another language"]),
    ],
)
def test_general_leaves_out_what_is_no_instruction(language: str, reasons: list[str]) -> None:
    found = [general_en_ko.row_of(item, language) for item in conversations(language)]
    assert sum(isinstance(row, dict) for row in found) == 12
    left_out = [row for row in found if isinstance(row, str)]
    for reason in reasons:
        assert sum(reason in one for one in left_out) == 1
    system, cut = found[:2]
    assert isinstance(system, dict) and [m["role"] for m in system["messages"]] == ["system", "user", "assistant"]
    assert isinstance(cut, dict) and cut["prompt"].startswith(("What is 1", "1은"))  # the thanks led to no answer


# --- the hub -------------------------------------------------------------------------------------------------------


def test_no_network_names_the_way_round_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # a port that answers nothing
    with pytest.raises(UserError, match=r"cannot be reached .*hf download open-r1/OpenR1-Math-220k") as error:
        main(openr1_command(openr1_math.NAME, tmp_path))
    assert "--repo-type dataset" in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("rows.parquet", b"no parquet", "cannot be read as a data set"),
        ("rows.jsonl", b'{"question": "a"}\n', "has no column problem, answer, .*its columns are question"),
        ("rows.xlsx", b"", "ends in none of"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        main(openr1_command(tmp_path / file, tmp_path))


def test_a_name_is_a_hub_set_unless_it_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def path_of(given: str) -> Path | None:
        return hub.source_of(given, "a/b", None, "main").path

    monkeypatch.chdir(tmp_path)
    assert path_of("open-r1/OpenR1-Math-220k") is None
    assert path_of("data/rows.parquet") == Path("data/rows.parquet")
    assert path_of("./open-r1/OpenR1") == Path("open-r1/OpenR1")
    (tmp_path / "open-r1/OpenR1-Math-220k").mkdir(parents=True)
    assert path_of("open-r1/OpenR1-Math-220k") == Path("open-r1/OpenR1-Math-220k")
    with pytest.raises(UserError, match="no such file or folder"):
        hub.load(hub.source_of("./nothing", "a/b", None, "main"))


# --- convert -------------------------------------------------------------------------------------------------------

SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]
SHAPES = {
    "ours": ({"prompt": "a", "response": "b", "domain": "d"}, {"prompt": "a", "response": "b", "domain": "d"}),
    "openai": ({"prompt": "a", "completion": " b"}, {"prompt": "a", "response": "b"}),
    "alpaca": ({"instruction": "a", "input": "x", "output": "b"}, {"prompt": "a\n\nx", "response": "b"}),
    "alpaca without input": ({"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "response": "b"}),
    "dolly": (
        {"instruction": "a", "context": "x", "response": "b", "category": "qa"},
        {"prompt": "a\n\nx", "response": "b"},
    ),
    "chat": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "language": "en"},
        {"prompt": "a", "response": "b", "language": "en"},
    ),
    "sharegpt": (
        {"id": "1", "conversations": SHAREGPT},
        {"messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]},
    ),
    "text": ({"text": "a"}, {"text": "a"}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes_are_recognised(shape: str, tmp_path: Path) -> None:
    item, expected = SHAPES[shape]
    (tmp_path / "in.jsonl").write_text(json.dumps(item) + "\n")
    main(["convert", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert {key: row[key] for key in expected} == expected


def test_columns_are_mapped_from_csv_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('question,solution,id\n"a, b?",007,1\n')
    items = [{"question": "a, b?", "solution": "007", "id": 1}]
    datasets.Dataset.from_list(items).to_parquet(tmp_path / "in.parquet")
    for kind in ("csv", "parquet"):
        mapping = "prompt=question, response=solution, answer=solution"
        main(["convert", str(tmp_path / f"in.{kind}"), "--out", str(tmp_path / f"{kind}.jsonl"), "--map", mapping,
              "--domain", "maths"])  # fmt: skip
        (row,) = read_rows(tmp_path / f"{kind}.jsonl")
        del row["where"]
        assert row == {"prompt": "a, b?", "response": "007", "answer": "007", "domain": "maths"}


def test_rows_without_an_answer_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": null}\n')
    main(["convert", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    assert "1 rows; left out: 1 without response" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', [], "--map prompt=prompt,response=chosen"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}',
            [],
            "row 1: a turn's content is a list, not text",
        ),
        ('{"q": "a", "a": "b"}', [], r"columns 'q', 'a' are no known shape .*--map prompt=q,response=a"),
        ('{"q": "a", "a": "b"}', ["--map", "prompt=q,response=b"], "has no column b; its columns are q, a"),
        ('{"q": "a", "a": "b"}', ["--map", "prompt=q"], "--map needs prompt and response"),
        ('{"q": "a", "a": "b"}', ["--map", "promt=q,response=a"], "OURS one of prompt"),
        ('{"prompt": "a", "response": 3}', [], "row 1: 'response' is a int, not text"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}', [], "row 2: has no 'response'; its columns are prompt"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', [], "row 1: the speaker 'bot' is none of human, user"),
        ('{"messages": "a"}', [], "row 1: a conversation is a list of turns, not a str"),
        ('{"prompt": "a", "response": ""}', [], r"every row was left out \(without response\)"),
        ("{}", [], "row 1: has no columns"),
        ('{"prompt": "a", "response": "b"}', ["--map", ""], "--map : write OURS=THEIRS"),
    ],
)
def test_what_is_not_understood_is_refused(lines: str, options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lines + "\n")
    with pytest.raises(UserError, match=message):
        main(["convert", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), *options])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["absent.jsonl", "data/absent.csv", "absent.parquet"])
def test_a_file_that_is_not_there_is_no_hub_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name}: no such file$"):
        main(["convert", name, "--out", "out.jsonl"])


def test_endings_in_capitals_and_others(tmp_path: Path) -> None:
    for name in ("IN.CSV", "in.csv.gz"):
        (tmp_path / name).write_text("prompt,response\na,b\n")
    main(["convert", str(tmp_path / "IN.CSV"), "--out", str(tmp_path / "out.jsonl")])
    assert read_rows(tmp_path / "out.jsonl")[0]["response"] == "b"
    with pytest.raises(UserError, match=r"ends in none of \.jsonl, \.ndjson, \.csv, \.tsv, \.parquet"):
        main(["convert", str(tmp_path / "in.csv.gz"), "--out", str(tmp_path / "other.jsonl")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,response\na\n", "row 2: has another number"),
        (b"prompt,response\n", "no rows below"),
        (b"\xff", "UTF-8"),
    ],
)
def test_bad_csv_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        main(["convert", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out.jsonl")])


# --- check ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checked(tmp_path: Path) -> tuple[Path, Path]:
    train = [
        {"prompt": "What is one?", "response": "one", "domain": "en"},
        {"prompt": "what is one", "response": "one", "domain": "en"},
        {"prompt": "What is one?", "response": "two", "domain": "en"},
        {"prompt": "하나는?", "response": "하나", "domain": "ko"},
        {"prompt": "a b", "response": "c " * 40, "domain": "en"},
        {"prompt": "d " * 40, "response": "e", "domain": "en", "language": "de"},
    ]
    bench = [{"prompt": "What is ONE", "response": "1"}, {"prompt": "Two?", "response": "2"}]
    for name, rows in (("train", train), ("bench", bench)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "train.jsonl", tmp_path / "bench.jsonl"


def test_check_counts_what_training_would_do(checked: tuple[Path, Path]) -> None:
    tokenizer = make_tokenizer(chat_template=None, bos=True)
    report = check.inspect(checked[0], tokenizer, 40)
    assert (report.rows, report.repeated, report.copies) == (6, 2, 1)
    assert report.domains == {"en": 5, "ko": 1} and report.languages == {"Latin": 4, "Hangul": 1, "de": 1}
    trained = encode_rows(tokenizer, read_rows(checked[0]), 40)
    assert report.lost == trained.dropped == 1
    assert report.cut == trained.truncated + trained.dropped == 2
    assert Counter(map(len, report.lengths.values())) == {5: 1, 1: 1}
    whole = encode_rows(tokenizer, read_rows(checked[0]), check.UNCUT)
    assert sorted(report.all_lengths) == sorted(len(example.input_ids) for example in whole.rows)


def test_check_shows_a_leak_and_draws(
    checked: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(chat_template=None, bos=True).save_pretrained(tmp_path / "model")
    picture = tmp_path / "lengths.png"
    main(["check", str(checked[0]), "--bench", str(checked[1]), "--tokenizer", str(tmp_path / "model"),
          "--picture", str(picture)])  # fmt: skip
    assert "train.jsonl and bench.jsonl: 1 questions of the bench are trained on" in capsys.readouterr().out
    from matplotlib import pyplot as plt

    pixels = plt.imread(picture)
    assert pixels.shape[0] > 500 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def test_bars_are_empty_only_where_no_row_is() -> None:
    lengths = np.array([1] * 1000 + [25] + [99])
    assert check.bars(lengths, 40, count=4) == "█ ▁▁"


def test_check_default_length_is_the_configurations(checked: tuple[Path, Path], capsys: Any, tmp_path: Path) -> None:
    make_tokenizer(chat_template=None, bos=True).save_pretrained(tmp_path / "model")
    main(["check", str(checked[0]), "--tokenizer", str(tmp_path / "model")])
    assert f"max_length {Data().max_length}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "nothing/here/at/all"], "no folder or hub model with a tokenizer"),
        (["--tokenizer", "x", "--max-length", "1"], "at least 2"),
        (["--tokenizer", "x", "--picture", "a.txt"], "must end in .png"),
    ],
)
def test_check_refuses(checked: tuple[Path, Path], options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["check", str(checked[0]), *options])
