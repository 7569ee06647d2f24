"""The page of one or several runs, from their logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molora.errors import UserError
from molora.report import run
from molora.report.__main__ import main

NAMES = [f"model.layers.{layer}.mlp.{kind}" for layer in (0, 1) for kind in ("gate_proj", "down_proj")]


def write_run(folder: Path, *, domains: bool = True) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for step in (5, 10, 15):
        load = {"load": {name: [0.7, 0.3] for name in NAMES}}
        if domains:
            of = {"a": [1.0, 0.0], "b": [0.5, 0.5]}
            load["domains"] = {d: {"tokens": 9, "load": dict.fromkeys(NAMES, share)} for d, share in of.items()}
        lines.append({"step": step, "loss": 3 - step / 10, "lr": 1e-3, "grad_norm": 0.5, "z_loss": 1.9,
                      "load_balance": 1.1, "tokens_per_second": 100.0, "skipped": 1} | load)  # fmt: skip
    lines += [{"step": 15, "val_loss": 1.25}, {"step": 12, "warning": "loss <spike>"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    phases = "training: {phases: [{step: 0, trainable: [router]}, {step: 7, trainable: [router, lora]}]}\n"
    (folder / "config.yml").write_text(phases, encoding="utf-8")
    return folder


def test_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", str(write_run(tmp_path / "stage1")), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "run.html").read_text(encoding="utf-8")
    for text in ("learning rate", "speed", "domain and expert", "router, lora", "loss &lt;spike&gt;"):
        assert text in page
    assert (tmp_path / "out" / "run.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "stage1: 15 steps, loss 2.500 to 1.500, held out 1.250 to 1.250; 100 tokens per second; 1 steps" in said


def test_information_of_a_log_is_that_of_its_shares(tmp_path: Path) -> None:
    panel = run._information({"r": run.read(write_run(tmp_path / "r"))})
    assert panel is not None
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    panel.draw(ax)
    # H(0.75, 0.25) less the mean of H(1, 0) and H(0.5, 0.5)
    assert ax.lines[0].get_ydata() == pytest.approx([0.8112781 - 0.5] * 3, abs=1e-5)
    assert run._information({"r": run.read(write_run(tmp_path / "none", domains=False))}) is None


def test_several_runs_are_on_one_page(tmp_path: Path) -> None:
    folders = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    main(["run", *folders, "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "run.html").read_text(encoding="utf-8")
    assert "one training" in page and "two held out" in page


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing; give the --output-dir"):
        main(["run", str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[1]\n{"st')
    with pytest.raises(UserError, match="no line with a loss"):
        main(["run", str(tmp_path)])
