"""Greedy generation: batched gives what one at a time gives, and answers end where they should."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import (
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import molora
from molora import chat, generate, routing
from molora.errors import UserError

QUESTIONS = ["what is one", "is it a plain answer in a few words", "the sum of two three four", "six", "what"]


@pytest.fixture(scope="module")
def model(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    return with_large_weights(LlamaForCausalLM, tiny_config)


def with_large_weights(kind: type, config: PreTrainedConfig) -> Any:
    """Large enough that the tokens differ from one another and from row to row."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [chat.encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


def one_by_one(model: PreTrainedModel, prompt: list[int], steps: int, stops: list[int]) -> list[int]:
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


@pytest.mark.parametrize("window", [16, 59])
def test_batched_is_one_by_one_in_a_sliding_window(
    chat_tokenizer: PreTrainedTokenizerFast, tiny_config: LlamaConfig, window: int
) -> None:
    shape = {key: value for key, value in tiny_config.to_diff_dict().items() if key in MistralConfig().to_dict()}
    config = MistralConfig(**shape | {"model_type": "mistral", "sliding_window": window})
    model, given = with_large_weights(MistralForCausalLM, config), prompts(chat_tokenizer)
    assert_as_one_by_one(model, chat_tokenizer, given)


@pytest.mark.parametrize("window", [24, 44])
def test_batched_is_one_by_one_in_gpt_neos_window(chat_tokenizer: PreTrainedTokenizerFast, window: int) -> None:
    config = GPTNeoConfig(
        vocab_size=320, hidden_size=64, num_heads=4, num_layers=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=256, window_size=window,
    )  # fmt: skip
    assert_as_one_by_one(with_large_weights(GPTNeoForCausalLM, config), chat_tokenizer, prompts(chat_tokenizer))


def assert_as_one_by_one(model: Any, tokenizer: PreTrainedTokenizerFast, given: list[list[int]]) -> None:
    assert len({len(prompt) for prompt in given}) > 1 and generate._shared(given) > 0
    answers = generate.generate_tokens(model, tokenizer, given, max_new_tokens=12, batch_size=8)
    stops = chat.stop_token_ids(tokenizer)
    assert [answer.tokens for answer in answers] == [one_by_one(model, prompt, 12, stops) for prompt in given]


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


@pytest.mark.parametrize("rows", [1, 2])
def test_the_head_is_not_copied_for_each_row_of_the_batch(model: LlamaForCausalLM, rows: int) -> None:
    molora.inject(model, {"lora_r": 2})
    with torch.profiler.profile(record_shapes=True) as profile, torch.no_grad():
        model(torch.tensor([[1, 2, 3]] * rows), logits_to_keep=1)  # what generate asks for after a prompt
    shapes = [shape for event in profile.events() or () for shape in event.input_shapes or ()]
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    assert [hidden, vocabulary] in shapes and [rows, hidden, vocabulary] not in shapes
    molora.remove(model)
    assert not model.get_output_embeddings()._forward_pre_hooks


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


@pytest.mark.parametrize(
    "bad",
    [
        ["--max-new-tokens", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--seed", "18446744073709551616"],
        ["--routing-layer", "0"],
        ["--routing-projection", "up_proj"],
    ],
)
def test_command_line_refuses(bad: list[str]) -> None:
    with pytest.raises(UserError, match=bad[0]):
        generate.main(["--model", "x", *bad])


@pytest.mark.parametrize("option", ["--prompt", "--system", None])
def test_bytes_that_are_not_utf_8(option: str | None, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "\ub2e4\udcff"  # what Python makes of a byte that is not UTF-8
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{said}\n"))
    given = [option, said] if option else []
    with pytest.raises(UserError, match=f"{option or 'the question'}: not UTF-8 text"):
        generate.main(["--model", str(tiny_model_dir), "--device", "cpu", *given])


@pytest.fixture(scope="module")
def routed_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, tokenizer = molora.load(tiny_model_dir, device="cpu")
        molora.save_adapter(molora.inject(model, {"lora_r": 4, "init_b_std": 1.0}), folder)
        tokenizer.save_pretrained(folder)
    return folder


def test_routing_of_an_answer_is_that_of_the_whole_text(
    routed_dir: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, tokenizer = molora.load(routed_dir, device="cpu")
    question = [{"role": "user", "content": "what is one"}]
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with routing.observing(model) as seen:
        shown = generate.RoutingStreamer(tokenizer, console, seen, 4, 4)
        text = generate.answer(model, tokenizer, question, max_new_tokens=12, streamer=shown)
    prompt = chat.encode_prompt(tokenizer, question)
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), generation_config=generate._greedy(tokenizer, 12)
        ).sequences  # fmt: skip
        record = routing.record(model, torch.ones_like(ids), per_token=True)
        with routing.using(model, record):
            model(ids)
    assert shown.leaders == record.gates[4, 0, len(prompt) : -1].argmax(-1).tolist()
    assert len(set(shown.leaders)) > 1
    assert text


def written(console: Console, tokenizer: PreTrainedTokenizerFast, text: str, leaders: list[int], experts: int) -> str:
    """What a streamer writes for the tokens of ``text`` when the router's leaders are these."""
    seen: list[routing.Record] = []
    shown = generate.RoutingStreamer(tokenizer, console, seen, 0, experts)
    shown.put(torch.zeros(1, 3, dtype=torch.int64))
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokens) == len(leaders) + 1
    for token, leader in zip(tokens, [None, *leaders], strict=True):
        if leader is not None:
            gates = torch.zeros(1, 1, 1, experts)
            gates[..., leader] = 1.0
            seen.append(routing.Record(*[torch.zeros(())] * 5, gates=gates))
        shown.put(torch.tensor([token]))
    shown.end()
    assert shown.leaders == leaders
    return console.file.getvalue()


def test_routing_in_colour_and_without(
    chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text, leaders = "what is [b]", [0, 1, 1, 2, 2]

    def on(experts: int = 4, **settings) -> str:
        console = Console(file=io.StringIO(), width=200, **settings)
        return written(console, chat_tokenizer, text, leaders, experts)

    assert on() == "<0>what<1> is <2>[b]\n"  # no terminal
    coloured = on(force_terminal=True, color_system="truecolor")
    assert "48;2;0;114;178mwhat" in coloured and "<0>" not in coloured
    assert "<0>" in on(9, force_terminal=True, color_system="truecolor")
    assert "<0>" in on(force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert on(force_terminal=True, color_system="truecolor") == on()


def test_characters_of_several_tokens_are_written_whole(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "é한"
    tokens = chat_tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokens) == 5
    shown = written(Console(file=io.StringIO(), width=200), chat_tokenizer, text, [0, 1, 2, 3], 4)
    assert shown == "<1>é한\n"


def test_command_line_shows_routing(routed_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(routed_dir), "--prompt", "what is one", "--max-new-tokens", "6", "--device", "cpu"]
    generate.main([*arguments, "--show-routing", "--routing-layer", "1", "--routing-projection", "down_proj"])
    assert "leading expert of each token at model.layers.1.mlp.down_proj:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "says"),
    [(["--routing-layer", "7"], "layers with one: 0, 1"), (["--routing-projection", "o_proj"], "gate_proj, up_proj")],
)
def test_command_line_refuses_a_router_that_is_not_there(routed_dir: Path, bad: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        generate.main(["--model", str(routed_dir), "--prompt", "x", "--device", "cpu", "--show-routing", *bad])


def test_command_line_refuses_to_show_routing_of_a_base_model(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match="no routers"):
        generate.main(["--model", str(tiny_model_dir), "--prompt", "x", "--device", "cpu", "--show-routing"])
