"""Greedy generation: batched gives what one at a time gives, and answers end where they should."""

import io
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from molora import chat, generate
from molora.errors import UserError

QUESTIONS = ["what is one", "is it a plain answer in a few words", "the sum of two three four", "six", "what"]


@pytest.fixture(scope="module")
def model(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    # Weights large enough that the tokens differ from one another and from row to row.
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(tiny_config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [chat.encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


def one_by_one(model: LlamaForCausalLM, prompt: list[int], steps: int, stops: list[int]) -> list[int]:
    """Greedy decoding from its definition: no cache, no padding."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stops:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_batched_is_one_by_one(
    model: LlamaForCausalLM,
    chat_tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate, "ROUND", 3)
    given = prompts(chat_tokenizer)
    # Stop tokens that some rows meet early, some late and some never, so that rows leave the batch in between.
    free = [one_by_one(model, prompt, 20, []) for prompt in given]
    assert len({tuple(tokens) for tokens in free}) == len(free)
    stops = [free[0][1], free[1][7]]
    monkeypatch.setattr(chat, "stop_token_ids", lambda tokenizer: stops)
    expected = [one_by_one(model, prompt, 20, stops) for prompt in given]
    assert len({len(tokens) for tokens in expected}) > 2

    answers = generate.generate_tokens(model, chat_tokenizer, given, max_new_tokens=20, batch_size=batch_size)

    assert [answer.tokens for answer in answers] == expected
    assert [answer.finished for answer in answers] == [len(tokens) < 20 for tokens in expected]
    assert [answer.generated for answer in answers] == [min(len(tokens) + 1, 20) for tokens in expected]


def test_the_models_own_defaults_do_not_bend_it(
    model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = prompts(chat_tokenizer)
    before = generate.generate_tokens(model, chat_tokenizer, given, 12, 8)
    bent = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=2
    )
    monkeypatch.setattr(model, "generation_config", bent)
    assert generate.generate_tokens(model, chat_tokenizer, given, 12, 8) == before


def test_what_all_prompts_begin_with() -> None:
    assert generate._shared([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert generate._shared([[1, 2], [1, 2, 5]]) == 1  # the first keeps a token to be answered
    assert generate._shared([[1], [1]]) == 0
    ids, mask = generate._padded([[1, 2, 3, 4], [1, 2, 5]], 2, 0, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3, 4], [1, 2, 0, 5]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 1]]


def test_progress_counts_every_row_once(model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    told: list[int] = []
    generate.generate_tokens(model, chat_tokenizer, prompts(chat_tokenizer), 4, 2, told.append)
    assert sum(told) == len(QUESTIONS)


def test_generate_batch_takes_questions_and_conversations(
    model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    question = "what is one"
    as_text, as_messages = generate.generate_batch(
        model, chat_tokenizer, [question, [{"role": "user", "content": question}]], max_new_tokens=6
    )
    assert as_text == as_messages != ""
    assert "<|im_end|>" not in as_text


def test_bad_arguments(model: LlamaForCausalLM, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate.generate_tokens(model, chat_tokenizer, [[1]], 0, 1)
    with pytest.raises(ValueError, match="no tokens"):
        generate.generate_tokens(model, chat_tokenizer, [[]], 1, 1)
    assert generate.generate_tokens(model, chat_tokenizer, [], 1, 1) == []


def test_command_line_answers_a_prompt(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tiny_model_dir), "--prompt", "what is one", "--max-new-tokens", "5", "--device", "cpu"]
    generate.main(arguments)
    first = capsys.readouterr().out
    generate.main([*arguments, "--temperature", "5"])
    assert first  # newlines, from random weights
    assert capsys.readouterr().out != first


def test_command_line_converses(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[list[dict[str, str]]] = []

    def answer(model, tokenizer, messages, *rest) -> str:
        heard.append(list(messages))
        return "seven"

    monkeypatch.setattr(generate, "answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("three\n\nfour\n/reset\nfive\n"))
    generate.main(["--model", str(tiny_model_dir), "--system", "be plain", "--device", "cpu"])
    roles = [[(m["role"], m["content"]) for m in messages] for messages in heard]
    system = ("system", "be plain")
    assert roles == [
        [system, ("user", "three")],
        [system, ("user", "three"), ("assistant", "seven"), ("user", "four")],
        [system, ("user", "five")],
    ]


@pytest.mark.parametrize("bad", [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--temperature", "nan"]])
def test_command_line_refuses(bad: list[str]) -> None:
    with pytest.raises(UserError, match=bad[0]):
        generate.main(["--model", "x", *bad])
