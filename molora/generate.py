"""Answers of a model: many at once, greedily, for evaluation; or on the terminal, as they are written.

    python -m molora.generate --model outputs/quickstart/stage2/final --prompt "What is 12 + 30 - 7?"
    python -m molora.generate --model outputs/quickstart/stage2/final
    python -m molora.generate --model outputs/quickstart/stage2/final --show-routing --routing-layer 12

Shape letters: B rows, P tokens of a prompt or of its beginning.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.style import Style
from rich.text import Text
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from molora import chat, cli, routing
from molora.adapter import load
from molora.chat import Message
from molora.colours import COLOURS, colour, ink
from molora.errors import UserError

ROUND = 16
"""Tokens between two looks at which rows of a batch are finished; those leave it, and the others go faster."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt."""

    tokens: list[int]
    """Without the stop token."""
    finished: bool
    """It ended with a stop token, not because there was no room for more."""

    @property
    def generated(self) -> int:
        """Tokens that the model produced, the stop token too."""
        return len(self.tokens) + self.finished


# --- many at once ------------------------------------------------------------------------------------------------


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    max_new_tokens: int = 256,
    batch_size: int = 32,
) -> list[str]:
    """Greedy answers, as text without special tokens, to questions or to conversations that end with one."""
    conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    ids = [chat.encode_prompt(tokenizer, conversation) for conversation in conversations]
    return [
        decode(tokenizer, answer.tokens)
        for answer in generate_tokens(model, tokenizer, ids, max_new_tokens, batch_size)
    ]


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], object] = lambda rows: None,
) -> list[Answer]:
    """Greedy answers to tokenised prompts, in their order; what the model's own generation defaults say is ignored.

    Prompts of about the same length are answered together, the longest first, so that a lack of memory shows at once.
    ``on_progress`` is told how many rows were finished since it was last called. Raises ValueError for an empty
    prompt and for ``max_new_tokens`` or ``batch_size`` below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1")
    if not all(prompts):
        raise ValueError("a prompt has no tokens; there is nothing to go on from")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        done = _generate(model, tokenizer, [prompts[i] for i in batch], max_new_tokens, on_progress)
        answers.update(zip(batch, done, strict=True))
    return [answers[i] for i in range(len(prompts))]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """An answer's tokens as text, without special tokens and surrounding space."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_progress: Callable[[int], object],
) -> list[Answer]:
    """One batch, in rounds of :data:`ROUND` tokens that share a KV cache; finished rows leave it between rounds."""
    stops = set(chat.stop_token_ids(tokenizer))
    # A sliding window counts padding too: between the beginning and the rest it would push the beginning out.
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", getattr(config, "window_size", None))  # of GPT-Neo, the latter
    slides = window is not None and max(map(len, prompts)) + max_new_tokens > window
    shared = 0 if slides else _shared(prompts)
    ids, mask = _padded(prompts, shared, _pad_id(tokenizer), model.device)
    cache = prefix_cache(model, ids[0, :shared], len(prompts)) if shared and len(prompts) > 1 else None
    rows = list(range(len(prompts)))  # whose prompt is in which row of `ids`
    answers: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    left = max_new_tokens
    generate: Any = model.generate  # typed as a tensor by torch's Module.__getattr__
    while rows and left > 0:
        length = ids.shape[1]
        out: Any = generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=_greedy(tokenizer, min(ROUND, left)),
        )
        ids, cache = out.sequences, out.past_key_values
        new = ids[:, length:]
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        left -= new.shape[1]
        for row, tokens in zip(rows, new.tolist(), strict=True):
            end = next((i for i, token in enumerate(tokens) if token in stops), None)
            answers[row] += tokens[:end]
            finished[row] = end is not None
        keep = [i for i, row in enumerate(rows) if not finished[row]]
        if len(keep) < len(rows):
            on_progress(len(rows) - len(keep))
            kept = torch.tensor(keep, device=ids.device, dtype=torch.int64)
            ids, mask = ids[kept], mask[kept]
            cache.batch_select_indices(kept)
            rows = [rows[i] for i in keep]
    on_progress(len(rows))
    return [Answer(tokens, end) for tokens, end in zip(answers, finished, strict=True)]


def prefix_cache(model: PreTrainedModel, prefix: Tensor, rows: int) -> Any:
    """The KV cache of ``prefix`` (P,), the beginning of every one of ``rows`` rows, computed once and repeated.

    A chat template's system message, a task's instructions: in a bench they are much of every prompt.
    """
    with torch.no_grad():
        cache = model.base_model(input_ids=prefix[None], use_cache=True).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; each is left at least one of its own, which is what gets answered."""
    most = min(map(len, prompts)) - 1
    columns = zip(*(prompt[:most] for prompt in prompts), strict=True)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), most)


def _padded(prompts: Sequence[Sequence[int]], shared: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (B, P) int64: the ``shared`` first tokens, padding, and the rest up to the end."""
    gaps = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    rows = [(list(prompt[:shared]), gap, list(prompt[shared:])) for prompt, gap in zip(prompts, gaps, strict=True)]
    ids = [first + [pad] * gap + rest for first, gap, rest in rows]
    mask = [[1] * len(first) + [0] * gap + [1] * len(rest) for first, gap, rest in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _greedy(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    # `generate` fills what is left open from the model's own defaults, so what they could bend is stated here.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=chat.stop_token_ids(tokenizer) or None,
        pad_token_id=_pad_id(tokenizer),
        use_cache=True,
        return_dict_in_generate=True,
    )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # The attention mask hides padding; the id only has to be in the vocabulary.
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


# --- one at a time -----------------------------------------------------------------------------------------------


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    streamer: BaseStreamer | None = None,
) -> str:
    """The model's next message in a conversation; ``temperature`` 0 is greedy. ``streamer`` gets it word by word."""
    config = _greedy(tokenizer, max_new_tokens)
    if temperature > 0:
        config.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    prompt = torch.tensor([chat.encode_prompt(tokenizer, messages)], device=model.device)
    generate: Any = model.generate  # typed as a tensor by torch's Module.__getattr__
    out: Any = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=streamer)
    return decode(tokenizer, out.sequences[0, prompt.shape[1] :].tolist())


class RoutingStreamer(BaseStreamer):
    """Writes an answer as it comes, each token on the colour of its leading expert at one router.

    A token's own routing is known when the model reads it, which is one step after it was written; the last token is
    never read and stays plain. Where colours are missing or would repeat, ``<e>`` stands where expert e takes over.

    Args:
        seen: what :func:`molora.routing.observing` gives for the forwards of this answer.
        router: row of the router in the records.
        experts: how many it chooses from.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        console: Console,
        seen: list[routing.Record],
        router: int,
        experts: int,
    ) -> None:
        self.tokenizer, self.console, self.seen, self.router, self.experts = tokenizer, console, seen, router, experts
        # The 16 colours of plain terminals are too few to tell eight experts apart.
        self.marks = console.no_color or console.color_system not in ("256", "truecolor") or experts > len(COLOURS)
        self.leaders: list[int] = []
        """The leading expert of each token that was read."""
        self._started = False
        self._tokens: list[int] = []
        self._written = 0  # characters of the answer

    def put(self, value: Tensor) -> None:
        if self._started and self._tokens:
            self._read_last()
        elif not self._started:
            self._started = True  # the prompt, which is not shown
            return
        self._tokens += value.flatten().tolist()

    def end(self) -> None:
        self._write(None)
        self.console.print()

    def _read_last(self) -> None:
        gates = self.seen[-1].gates
        assert gates is not None
        self.seen.clear()
        leader = int(gates[self.router, 0, -1].argmax())
        self._write(leader)
        self.leaders.append(leader)

    def _write(self, leader: int | None) -> None:
        """What the tokens so far add to the text, unless they end within a character."""
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        new = text[self._written :]
        if not new or (leader is not None and new.endswith("\ufffd")):
            return
        self._written = len(text)
        marked = self.marks and leader is not None and self.leaders[-1:] != [leader]
        style = Style() if leader is None else _style(leader)
        self.console.print(Text(f"<{leader}>" if marked else "").append(new, style), end="", soft_wrap=True)

    def legend(self, name: str) -> Text:
        """Which router this was, and each expert's share of the tokens that were read."""
        legend = Text(f"leading expert of each token at {name}:")
        for expert in range(self.experts):
            share = self.leaders.count(expert) / max(len(self.leaders), 1)
            legend.append("  ").append(f" {expert} ", _style(expert)).append(f" {share:.0%}")
        return legend.append(" of tokens")


def _style(expert: int) -> Style:
    return Style(color=ink(colour(expert)), bgcolor=colour(expert))


def pick_router(names: Sequence[str], layer: int | None, projection: str | None) -> int:
    """The row of a router by decoder layer and kind of projection; by default the first kind, in the middle layer.

    Raises :class:`UserError` for a model without routers, or without this one.
    """
    kinds = routing.by_kind(names)
    if not kinds:
        raise UserError("--show-routing: this model has no routers; give a stage's final/ folder")
    if projection is not None and projection not in kinds:
        raise UserError(f"--routing-projection {projection}: no such router; this model has {', '.join(kinds)}")
    rows = kinds[projection or next(iter(kinds))]
    if layer is not None and layer not in rows:
        raise UserError(f"--routing-layer {layer}: no router there; layers with one: {', '.join(map(str, rows))}")
    return rows[list(rows)[len(rows) // 2] if layer is None else layer]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` default to the process's own. Raises :class:`UserError` for bad input."""
    options = _parse(arguments)
    cli.require_positive(options, "max_new_tokens")
    if not options.show_routing and (options.routing_layer is not None or options.routing_projection is not None):
        raise UserError("--routing-layer and --routing-projection say what --show-routing shows; give it too")
    if not 0 <= options.temperature < float("inf"):
        raise UserError(f"--temperature {options.temperature}: must be 0 (greedy) or a positive number")
    if not -(2**63) <= options.seed < 2**64:
        raise UserError(f"--seed {options.seed}: must be from -2^63 to 2^64 - 1")
    for name in ("prompt", "system"):
        _check_text(getattr(options, name) or "", f"--{name}")
    torch.manual_seed(options.seed)
    model, tokenizer = load(options.model, options.device, options.precision)
    console = Console(highlight=False)
    names = routing.names(model) if options.show_routing and hasattr(model, "molora") else []
    router = pick_router(names, options.routing_layer, options.routing_projection) if options.show_routing else None
    system: list[Message] = [{"role": "system", "content": options.system}] if options.system else []

    def reply(messages: list[Message]) -> str:
        settings = (messages, options.max_new_tokens, options.temperature)
        if router is None:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            return answer(model, tokenizer, *settings, streamer)
        with routing.observing(model) as seen:
            shown = RoutingStreamer(tokenizer, console, seen, router, routing.ledger_of(model).experts)
            text = answer(model, tokenizer, *settings, shown)
        console.print(shown.legend(names[router]), soft_wrap=True)
        return text

    if options.prompt is not None:
        reply([*system, {"role": "user", "content": options.prompt}])
        return
    print("Ask something. /reset forgets the conversation; Ctrl-D ends it.")
    messages = list(system)
    while (question := _ask()) is not None:
        if question == "/reset":
            messages = list(system)
        elif question:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": reply(messages)})


def _ask() -> str | None:
    """A line from the user, or None at the end of input."""
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    _check_text(line, "the question")
    return line


def _check_text(text: str, what: str) -> None:
    # Python keeps bytes that are not UTF-8 as half characters, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what}: not UTF-8 text; set the terminal, or save the file, as UTF-8") from None


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m molora.generate", description="Talk to a model: one --prompt, or a conversation without it."
    )
    parser.add_argument("--model", required=True, help="stage's final/ folder, model folder or hub name")
    parser.add_argument("--prompt", help="answer this and stop; without it, a conversation")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, always takes the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    cli.add_model_options(parser)
    parser.add_argument(
        "--show-routing", action="store_true", help="colour each token by its leading expert; NO_COLOR=1 marks it <e>"
    )
    parser.add_argument("--routing-layer", type=int, metavar="N", help="whose router (default: the middle layer's)")
    parser.add_argument("--routing-projection", metavar="NAME", help="such as down_proj (default: the first kind)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 # gives input() line editing and a history
    cli.run(main)
