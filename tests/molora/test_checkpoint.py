"""The output folder's rules; saving and going on are tested with whole runs in test_trainer.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from molora import checkpoint, config
from molora.errors import UserError
from molora.files import file_sha256


def make_run(output: Path, *steps: int, final: bool = False) -> None:
    for name in [*(f"checkpoint-{step}" for step in steps), *(["final"] if final else [])]:
        folder = output / name
        folder.mkdir(parents=True)
        (folder / "a").write_text(name)
        (folder / "SHA256SUMS").write_text(f"{file_sha256(folder / 'a')}  a\n")
    (output / "metrics.jsonl").write_text("")


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def test_a_free_folder_can_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.claim(tmp_path, resume=False, overwrite=False)
    checkpoint.claim(tmp_path / "new" / "deep", resume=False, overwrite=False)
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(("final", "message"), [(True, "finished run"), (False, "unfinished run")])
def test_a_run_is_not_taken_over_silently(tmp_path: Path, final: bool, message: str) -> None:
    make_run(tmp_path, 2, final=final)
    with pytest.raises(UserError, match=message):
        checkpoint.claim(tmp_path, resume=False, overwrite=False)
    checkpoint.claim(tmp_path, resume=False, overwrite=True)
    checkpoint.claim(tmp_path, resume=True, overwrite=False)
    assert checkpoint.finished(tmp_path) is final


def test_clearing_takes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path, 2, 10, final=True)
    (tmp_path / ".checkpoint-12.tmp").mkdir()
    for mine in ("notes.txt", "checkpoint-old", "finals"):
        (tmp_path / mine).write_text("mine")
    checkpoint.clear(tmp_path)
    assert names(tmp_path) == ["checkpoint-old", "finals", "notes.txt"]


def test_the_newest_whole_checkpoint_by_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint.newest(tmp_path / "none") is None
    make_run(tmp_path, 2, 9, 10)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "SHA256SUMS").write_text("")
    (tmp_path / "checkpoint-9" / "a").write_text("altered")
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-2"
    assert "SHA256SUMS is empty); checkpoint-2 is used" in caplog.text
    (tmp_path / "checkpoint-2" / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"no checkpoint is whole: .*checkpoint-10 .*--overwrite"):
        checkpoint.newest(tmp_path)


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    make_run(tmp_path, 2, 9, 10, final=True)
    checkpoint.prune(tmp_path, None, 10)
    assert len(names(tmp_path)) == 5
    checkpoint.prune(tmp_path, 1, 9)  # the run went on from before a damaged checkpoint-10
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9", "final", "metrics.jsonl"]


@pytest.mark.parametrize("name", ["x" * 300, "link"])
def test_an_output_that_cannot_be_made_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="choose another --output-dir"):
        checkpoint.claim(tmp_path / name, resume=False, overwrite=False)
    with pytest.raises(UserError, match="choose another --output-dir"):
        checkpoint.describe(tmp_path / name, config.Config(), {})
