"""What a model, an adapter or an output folder from somebody else can do: nothing that was not asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import molora
from molora import cli, train
from molora.errors import UserError


def arguments(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    values = [
        f"model_name={model}", f"data.path={rows}", "data.max_length=64", "device=cpu",
        "model.load_precision.mode=fp32", "injection.lora_r=2", "training.max_train_steps=2",
        "training.batch_size=2", "training.save_steps=1", *more,
    ]  # fmt: skip
    preset = output.parent / "preset.yml"
    preset.parent.mkdir(parents=True, exist_ok=True)
    preset.write_text("training: {log_steps: 1}\n")
    return ["--preset", str(preset), "--output-dir", str(output), *(w for value in values for w in ("--set", value))]


def run(*given: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: train.main(list(given)))
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_two_stages_and_loading_open_no_connection(
    tiny_model_dir: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[Any] = []

    def refuse(*asked: Any, **_: Any) -> Any:
        asked_for.append(asked)  # who asks may live with a refusal
        raise OSError(f"the network was asked for {asked}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run(*arguments(tiny_model_dir, rows_file, tmp_path / "one")) == 0
    assert run(*arguments(tmp_path / "one" / "final", rows_file, tmp_path / "two")) == 0
    assert run(*arguments(tmp_path / "one" / "final", rows_file, tmp_path / "three"), "--preflight") == 0
    molora.load(tmp_path / "two" / "final")
    assert asked_for == []


def test_code_that_comes_with_a_model_is_not_run(model: Path, rows_file: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (model / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "unknown", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (model / "config.json").write_text(json.dumps(settings))
    assert run(*arguments(model, rows_file, tmp_path / "run")) == 2
    assert not ran.exists()


def test_weights_that_are_not_safetensors_are_refused(
    model: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert run(*arguments(model, rows_file, tmp_path / "run")) == 2
    assert "safetensors" in capsys.readouterr().err


class Payload:
    """Pickled, it is a call."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.ran,)


def test_code_in_a_training_state_is_not_run(
    tiny_model_dir: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever can put the file there can put its checksum there too."""
    output, ran = tmp_path / "run", tmp_path / "ran"
    assert run(*arguments(tiny_model_dir, rows_file, output)) == 0
    shutil.rmtree(output / "final")
    folder = output / "checkpoint-2"
    torch.save({"progress": Payload(ran)}, folder / "training_state.pt")
    digest = hashlib.sha256((folder / "training_state.pt").read_bytes()).hexdigest()
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    lines = [f"{digest}  training_state.pt" if line.endswith("training_state.pt") else line for line in lines]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    assert run(*arguments(tiny_model_dir, rows_file, output), "--resume") == 2
    assert "training_state.pt: not a state that molora wrote" in capsys.readouterr().err
    assert not ran.exists()


def test_overwriting_removes_links_and_not_what_they_point_to(
    tiny_model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    output = tmp_path / "run"
    output.mkdir()
    for name in ("final", "checkpoint-1", ".checkpoint-2.tmp"):
        (output / name).symlink_to(elsewhere, target_is_directory=True)
    assert run(*arguments(tiny_model_dir, rows_file, output), "--overwrite") == 0
    assert (elsewhere / "mine.txt").read_text() == "mine"
    assert [path.name for path in output.iterdir() if path.is_symlink()] == []


def test_a_tokenizers_named_templates_write_no_file_of_their_choice(
    model: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": template}, {"name": "../../../escaped", "template": "x"}]
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert run(*arguments(model, rows_file, tmp_path / "a" / "b" / "run")) == 0
    assert list(tmp_path.rglob("escaped*")) == []
    _, tokenizer = molora.load(tmp_path / "a" / "b" / "run" / "final")
    assert tokenizer.chat_template == template
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named[1:]}))
    capsys.readouterr()
    assert run(*arguments(model, rows_file, tmp_path / "c" / "run")) == 2
    assert "none named 'default'" in capsys.readouterr().err


def test_a_presets_name_does_not_lead_out_of_outputs(tmp_path: Path) -> None:
    preset = tmp_path / "...yml"
    preset.write_text("seed: 1\n")
    with pytest.raises(UserError, match="give --output-dir"):
        train.main(["--preset", str(preset)])
