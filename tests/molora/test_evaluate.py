"""Losses against their definition, groups, exact match, and the command line."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import make_rows, write_jsonl
from molora import chat, data, evaluate, generate, inject, save_adapter
from molora.adapter import load
from molora.errors import UserError
from molora.loss import causal_lm_loss

ROWS = [
    {"prompt": "what is one", "response": "a plain answer", "domain": "general", "language": "en"},
    {"prompt": "six", "response": "it is a few", "domain": "general", "language": "ko"},
    {"prompt": "sum of one two", "response": "three", "answer": "3", "domain": "maths", "task": "sum"},
    {"prompt": "four is what", "response": "four", "answer": "4", "domain": "maths", "task": "echo"},
    {"prompt": "five", "response": "five words it is", "answer": "5", "domain": "maths", "task": "echo"},
]


@pytest.fixture(scope="module")
def model(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return LlamaForCausalLM(tiny_config).eval().requires_grad_(False)


def defined_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, row: dict) -> tuple[float, int]:
    """Sum and count over the answer's tokens, one row, one position at a time."""
    encoded = chat.encode_row(tokenizer, row, 4096)
    with torch.no_grad():
        log_p = model(torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    labelled = [(i, label) for i, label in enumerate(encoded.labels) if i and label != chat.IGNORE]
    return -sum(float(log_p[i - 1, label]) for i, label in labelled), len(labelled)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_losses(model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    result = evaluate.evaluate(model, chat_tokenizer, ROWS, batch_size=batch_size, max_new_tokens=3)
    expected = [defined_loss(model, chat_tokenizer, row) for row in ROWS]
    assert [row.tokens for row in result.rows] == [tokens for _, tokens in expected]
    assert [row.loss for row in result.rows] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    maths = expected[2:]
    assert result.loss("maths") == pytest.approx(sum(loss for loss, _ in maths) / sum(n for _, n in maths), rel=1e-5)
    entry = result.summary()["groups"]["general/en"]
    assert entry["perplexity"] == pytest.approx(math.exp(expected[0][0] / expected[0][1]), rel=1e-5)


def test_answer_losses_are_the_rows_of_the_training_loss(
    model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = data.Collate(chat_tokenizer)(data.encode_rows(chat_tokenizer, ROWS, 4096).rows)
    total, tokens = causal_lm_loss(model, batch)
    monkeypatch.setattr(evaluate, "CHUNK_ELEMENTS", 3 * model.config.vocab_size)
    losses = evaluate.answer_losses(model, batch)
    assert losses.shape == (len(ROWS),) and losses.dtype == torch.float32 and not losses.requires_grad
    assert float(losses.sum()) == pytest.approx(float(total), rel=1e-5)
    assert tokens > 3


def test_loss_rows_takes_the_first_of_each_group(
    model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluate.evaluate(model, chat_tokenizer, ROWS, loss_rows=1, max_new_tokens=2)
    assert [row.tokens > 0 for row in result.rows] == [True, True, True, True, False]
    assert result.exact_match("maths/echo") == (0, 2)


def test_exact_match_judges_what_the_model_wrote(
    model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"sum of one two": "1+2=3, so the answer is 3.", "four is what": "The answer is 5.", "five": "\\boxed{5}"}

    def answer(model, tokenizer, prompts, *rest) -> list[generate.Answer]:
        texts = [next(said[q] for q in said if f"user\n{q}<" in tokenizer.decode(ids)) for ids in prompts]
        return [generate.Answer(tokenizer(text).input_ids, finished=True) for text in texts]

    monkeypatch.setattr(evaluate, "generate_tokens", answer)
    rows = [*ROWS[:3], ROWS[3] | {"answer": 4}, ROWS[4] | {"answer": 5.0}]  # numbers are as good as text
    result = evaluate.evaluate(model, chat_tokenizer, rows)
    assert [row.correct for row in result.rows] == [None, None, True, False, True]
    assert result.rows[2].prediction == said["sum of one two"]
    assert (result.exact_match("maths"), result.exact_match("maths/echo")) == ((2, 3), (1, 2))
    assert result.exact_match("general") is None
    assert result.summary()["groups"]["maths/echo"]["exact_match"] == 0.5


def test_a_conversation_is_asked_without_its_last_answer() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert evaluate._question({"messages": messages}) == messages[:3]
    assert len(messages) == 4


def test_training_mode_is_given_back(model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    try:
        evaluate.evaluate(model, chat_tokenizer, ROWS[:1])
        assert model.training and model.lm_head.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("answer", "message"),
    [("no idea", "the answer 'no idea'"), (["3"], "'answer' is a list"), (True, "'answer' is a bool")],
)
def test_an_answer_that_cannot_be_read_stops_before_anything_runs(
    answer: object, message: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    row = ROWS[2] | {"answer": answer, "where": "bench.jsonl:7"}
    with pytest.raises(UserError, match=rf"bench\.jsonl:7: {message}"):
        evaluate.evaluate(None, chat_tokenizer, [row])  # type: ignore[arg-type]


def test_routing_counts_answer_tokens(tiny_model_dir: Path) -> None:
    model, tokenizer = load(tiny_model_dir, device="cpu", precision="fp32")
    inject(model, {"num_experts": 4, "top_k": 2, "lora_r": 2})
    counts = evaluate.routing_counts(model, tokenizer, ROWS, batch_size=2)
    tokens = sum(label != chat.IGNORE for row in ROWS for label in chat.encode_row(tokenizer, row, 4096).labels)
    assert counts.shape == (6, 4)
    assert counts.sum(dim=1).tolist() == [2 * tokens] * 6
    assert torch.equal(counts, evaluate.routing_counts(model, tokenizer, ROWS, batch_size=5))


def test_nothing_to_measure(model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="none of 1 rows"):
        evaluate.evaluate(model, chat_tokenizer, ROWS[:1], max_length=4)
    with pytest.raises(UserError, match=r"^bench\.jsonl: none of 1 rows"):
        evaluate.evaluate(model, chat_tokenizer, [ROWS[0] | {"where": "bench.jsonl:1"}], max_length=4)


def test_an_answer_of_the_last_bench_that_cannot_be_read_is_found_first(
    tiny_model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [*make_rows(3), make_rows(1)[0] | {"answer": "no idea"}])
    arguments = ["--model", str(tiny_model_dir), "--bench", str(rows_file), "--bench", str(bad), "--device", "cpu"]
    arguments += ["--kept", str(tmp_path / "kept"), "--max-new-tokens", "2"]
    with pytest.raises(UserError, match=r"bad\.jsonl:4: the answer 'no idea'"):
        evaluate.main(arguments)
    assert not (tmp_path / "kept").exists()
    evaluate.main([*arguments, "--limit", "3"])


def test_command_line(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load(tiny_model_dir, device="cpu")
    inject(model, {"num_experts": 2, "top_k": 1, "lora_r": 2})
    adapter = save_adapter(model, tmp_path / "final")
    bench, output = tmp_path / "bench.jsonl", tmp_path / "deep" / "result.json"
    bench.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    options = [
        "--bench",
        str(bench),
        "--max-new-tokens",
        "4",
        "--limit",
        "4",
        "--device",
        "cpu",
        "--kept",
        str(tmp_path / "kept"),
    ]

    evaluate.main(["--model", "base", "--model", str(adapter), *options, "--output", str(output)])

    written = json.loads(output.read_text(encoding="utf-8"))
    base, adapted = written["results"]
    assert written["baseline"] == "base" and "difference" not in base
    assert adapted["difference"]["maths"]["exact_match"]["value"] == 0
    assert (base["model"], adapted["model"]) == ("base", str(adapter))
    assert len(base["rows"]) == 4
    # The adapter starts as the base model.
    assert adapted["groups"]["maths"]["loss"] == pytest.approx(base["groups"]["maths"]["loss"], rel=1e-3)
    assert written["provenance"]["data"][str(bench)]
    shown = capsys.readouterr().out
    assert "maths/sum" in shown and "general/ko" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "base"], "the base of what"),
        (["--model", "x", "--batch-size", "0"], "--batch-size 0"),
        (["--model", "x", "--limit", "-1"], "--limit -1"),
        (["--model", "x", "--baseline", "y"], "--baseline y: is none of the models"),
        ([], "--model is missing"),
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "x", "--model", "x/"], "given twice"),
        (["--model", "./nowhere", "--output", "rows.jsonl"], "rows.jsonl: is read here"),
        (["--model", "./nowhere", "--output", "."], "is a folder"),
        (["--model", "./nowhere", "--lm-eval-path", "."], "say how --lm-eval asks"),
        (["--model", "./nowhere", "--lm-eval-chat"], "say how --lm-eval asks"),
    ],
)
def test_command_line_refuses(
    arguments: list[str], message: str, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows_file.parent)
    with pytest.raises(UserError, match=message):
        evaluate.main([*arguments, "--bench", str(rows_file)])


@pytest.mark.parametrize("option", ["--batch-size", "--limit"])
def test_command_line_refuses_for_the_harness_alone(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} 0: must be at least 1"):
        evaluate.main(["--model", "./nowhere", "--lm-eval", "task", option, "0"])


def test_a_killed_run_goes_on_where_it_was(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = write_jsonl(tmp_path / "bench.jsonl", ROWS)
    opened = evaluate.Opened(tiny_model_dir, "cpu")
    settings = {"batch_size": 2, "max_new_tokens": 3}
    whole = evaluate.evaluate_kept(opened, bench, tmp_path / "whole", **settings)
    batches: list[int] = []
    losses, generate_tokens = evaluate.answer_losses, evaluate.generate_tokens

    def counted(model, batch):
        batches.append(len(batch.domains))
        return losses(model, batch)

    def killed(model, tokenizer, prompts, *rest):
        if len(prompts) == 1:
            raise KeyboardInterrupt
        batches.append(-len(prompts))
        return generate_tokens(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(evaluate, "answer_losses", counted)
    monkeypatch.setattr(evaluate, "generate_tokens", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate_kept(opened, bench, tmp_path / "kept", **settings)
    assert batches == [2, 2, 1, -2]
    monkeypatch.setattr(evaluate, "generate_tokens", generate_tokens)
    found = evaluate.evaluate_kept(opened, bench, tmp_path / "kept", **settings)
    assert batches == [2, 2, 1, -2]  # no loss again
    assert found.rows == whole.rows
    never = evaluate.Opened(tiny_model_dir, "cpu")
    monkeypatch.setattr(evaluate, "load", None)  # all is there: the model is not even loaded
    assert evaluate.evaluate_kept(never, bench, tmp_path / "kept", **settings) == found
    first = evaluate.evaluate_kept(never, bench, tmp_path / "kept", limit=2, **settings)
    assert first.rows == whole.rows[:2]


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "vocab.json", "merges.txt", "generation_config.json", "special_tokens_map.json",
             "chat_template.jinja", "additional_chat_templates/tools.jinja", "modeling_own.py"],
)  # fmt: skip
def test_fingerprint_counts_every_file_that_decides_what_a_model_reads_or_says(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "README.md").write_text("says nothing")
    (tmp_path / name).write_text("one")
    one = evaluate.fingerprint(tmp_path)
    assert list(one) == [name]
    (tmp_path / name).write_text("other")
    assert evaluate.fingerprint(tmp_path) != one


def test_fingerprint_of_an_adapter_counts_its_base(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    model, _ = load(base, device="cpu")
    adapter = save_adapter(inject(model, {"num_experts": 2, "top_k": 1, "lora_r": 2}), tmp_path / "final")
    before = evaluate.fingerprint(adapter)
    (base / "generation_config.json").write_text('{"eos_token_id": [1]}')
    assert evaluate.fingerprint(adapter) != before


def test_measured_anew_with_other_arithmetic(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measuring() -> dict:
        return evaluate._measuring(evaluate.Opened(tiny_model_dir, "cpu"))

    before = measuring()
    for name, value in (
        ("pick_dtype", lambda *_: torch.float64),
        ("pick_device", lambda _: torch.device("meta")),
        ("transformers.__version__", "0"),
        ("MEASUREMENT", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"molora.evaluate.{name}", value)
            assert measuring() != before
    assert measuring() == before


@pytest.mark.parametrize("changed", ["model", "bench", "settings"])
def test_what_was_kept_of_something_else_is_not_used(changed: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder, bench = shutil.copytree(tiny_model_dir, tmp_path / "model"), write_jsonl(tmp_path / "bench.jsonl", ROWS[:2])
    evaluate.evaluate_kept(evaluate.Opened(folder, "cpu"), bench, tmp_path / "kept", batch_size=2)
    if changed == "model":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"@")
    if changed == "bench":
        write_jsonl(bench, [ROWS[1], ROWS[0]])
    batch_size = 1 if changed == "settings" else 2
    evaluate.evaluate_kept(evaluate.Opened(folder, "cpu"), bench, tmp_path / "kept", batch_size=batch_size)
    assert len(list((tmp_path / "kept").iterdir())) == 2
