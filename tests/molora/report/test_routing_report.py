"""The routing report on a tiny model: its numbers, its page, and what it refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import molora
from molora import chat, routing
from molora.data import read_rows
from molora.errors import UserError
from molora.report.__main__ import main
from molora.report.observe import observe, pieces
from molora.report.routing import numbers_of
from tests.conftest import make_rows, write_jsonl


@pytest.fixture(scope="module")
def given(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two stages, stage1/final and stage2/final, and two files of rows."""
    folder = tmp_path_factory.mktemp("report")
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model, tokenizer = molora.load(tiny_model_dir, device="cpu")
        molora.inject(model, {"lora_r": 4, "init_b_std": 0.02, "target_keywords": ["up_proj"]})  # few pictures
        for stage in ("stage1", "stage2"):
            molora.save_adapter(model, folder / stage / "final")
            tokenizer.save_pretrained(folder / stage / "final")
            for router in model.molora.routers:
                torch.nn.init.normal_(router.weight)
    write_jsonl(folder / "a.jsonl", make_rows(9))
    write_jsonl(folder / "b.jsonl", [{"prompt": "<b>&", "response": f"six <i>& 한국 {i}"} for i in range(9)])
    return folder


def report(given: Path, out: Path, *more: str) -> None:
    data = [f"--data=a={given / 'a.jsonl'}", f"--data=b={given / 'b.jsonl'}"]
    main(["routing", *data, "--out", str(out), "--device=cpu", "--permutations=19", "--rows=6", *more])


def stages(given: Path, *names: str) -> list[str]:
    return [f"--model={given / name / 'final'}" for name in names]


def test_numbers_are_those_of_the_answers_tokens(given: Path, tiny_model_dir: Path) -> None:
    model, tokenizer = molora.load(tiny_model_dir, device="cpu", precision="fp32")
    molora.inject(model, {"lora_r": 4, "init_b_std": 0.02}).eval()
    for router in model.molora.routers:
        torch.nn.init.normal_(router.weight)
    data = {"a": read_rows(given / "a.jsonl"), "b": read_rows(given / "b.jsonl")}
    seen = observe(model, tokenizer, data, max_length=64, batch_size=4)
    counts, probabilities = torch.zeros(2, 6, 4), torch.zeros(2, 6, 4)
    tokens = [0, 0]
    for domain, rows in enumerate(data.values()):
        for row in rows:
            encoded = chat.encode_row(tokenizer, row, 64)
            mask = torch.tensor([encoded.labels]) != chat.IGNORE
            record = routing.record(model, mask)
            with routing.using(model, record), torch.no_grad():
                model(torch.tensor([encoded.input_ids]))
            counts[domain] += record.counts
            probabilities[domain] += record.sums[:, 1:]
            tokens[domain] += int(mask.sum())
    numbers = numbers_of(seen, permutations=9, seed=0)
    for domain, (name, entry) in enumerate(numbers["domains"].items()):
        share = counts[domain] / (2 * tokens[domain])
        assert entry["tokens"] == tokens[domain] and entry["rows"] == 9 and name == "ab"[domain]
        torch.testing.assert_close(torch.tensor(entry["share"]), share)
        balance = 4 * (share * probabilities[domain] / tokens[domain]).sum(-1)
        torch.testing.assert_close(torch.tensor(entry["load_balance"]), balance)
    assert seen.counts_of_rows().sum(0).tolist() == counts.sum(0).tolist()


class Elements(HTMLParser):
    """Tags with their attributes, and the text of the token view."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_report_of_two_stages(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(given, tmp_path, *stages(given, "stage1", "stage2"))
    numbers = json.loads((tmp_path / "routing.json").read_text(encoding="utf-8"))
    assert list(numbers["models"]) == ["stage1", "stage2"]
    assert numbers["models"]["stage1"]["domains"]["a"]["rows"] == 6
    drift = numbers["drift"]["stage1 to stage2"]
    assert all(len(values) == 2 for values in drift.values())
    assert max(drift["changed_choice"]) > 0 and min(drift["weight_relative_change"]) > 1
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"stage1-shares.png", "stage2-information.png", "drift-stage1-to-stage2.png"} <= pictures
    page = (tmp_path / "routing.html").read_text(encoding="utf-8")
    elements = Elements(page).found
    # Nothing is fetched: the only addresses are XML namespaces, and no element names a source.
    assert not [tag for tag, of in elements if tag in ("link", "img", "iframe") or ({"src", "href"} & of.keys()
                and not str(of.get("href", "#")).startswith("#"))]  # fmt: skip
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page  # what rows say is text, never markup
    spans = [of for tag, of in elements if tag == "span" and "data-e" in of]
    assert spans and all(re.fullmatch("[0-3]{2} [0-3]{2}", str(of["data-e"])) for of in spans)
    assert "tell the domains apart" in capsys.readouterr().out


def test_one_model_and_one_domain_have_a_report_too(given: Path, tmp_path: Path) -> None:
    main(["routing", *stages(given, "stage1"), f"--data=a={given / 'a.jsonl'}", f"--out={tmp_path}", "--device=cpu"])
    numbers = json.loads((tmp_path / "routing.json").read_text(encoding="utf-8"))
    assert "mutual_information" not in numbers["models"]["stage1"]
    assert (tmp_path / "shares.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows=0"], "--rows 0"),
        (["--data=c"], "write it as DOMAIN=FILE"),
        (["--data=a=x.jsonl"], "given twice"),
        (["--data=c=missing.jsonl"], "no such file"),
        (["--max-length=3"], "within --max-length 3"),
    ],
)
def test_refused(given: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        report(given, tmp_path / "out", *stages(given, "stage1"), *arguments)
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_found_before_models_are_read(given: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out: is a file; --out names a folder"):
        report(given, tmp_path / "out", "--model=nowhere")


def test_models_that_have_no_routers_or_cannot_be_compared(given: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no routers"):
        report(given, tmp_path, f"--model={tiny_model_dir}")
    model, _tokenizer = molora.load(tiny_model_dir, device="cpu")
    molora.save_adapter(molora.inject(model, {"lora_r": 4, "num_experts": 3}), tmp_path / "other")
    with pytest.raises(UserError, match="other routers"):
        report(given, tmp_path, *stages(given, "stage1"), f"--model={tmp_path / 'other'}")


def test_pieces_add_up_to_the_text(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "what is 한국 é?"
    tokens = chat_tokenizer(text, add_special_tokens=False).input_ids
    found = pieces(chat_tokenizer, tokens)
    assert "".join(found) == text and len(found) == len(tokens)
    assert "한" in found and "\ufffd" not in "".join(found)
