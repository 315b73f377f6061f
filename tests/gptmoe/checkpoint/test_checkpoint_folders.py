"""Which checkpoint is the newest, and which ones go."""

import logging
from pathlib import Path

import pytest

from gptmoe.checkpoint import checkpoint_name, latest, prune
from gptmoe.errors import CheckpointError


def complete(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_of_a_run_or_a_folder_or_the_checkpoint_itself(tmp_path: Path) -> None:
    complete(tmp_path / "checkpoints" / checkpoint_name(20))
    newest = complete(tmp_path / "checkpoints" / checkpoint_name(100))
    assert newest.name == "step-00000100"
    assert latest(tmp_path) == newest
    assert latest(tmp_path / "checkpoints") == newest
    assert latest(str(newest)) == newest


def test_the_step_decides_and_not_the_length_of_its_name(tmp_path: Path) -> None:
    complete(tmp_path / checkpoint_name(99_999_999))
    newest = complete(tmp_path / checkpoint_name(100_000_000))
    assert latest(tmp_path) == newest


def test_unfinished_ones_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = complete(tmp_path / "step-00000010")
    complete(tmp_path / "step-00000040.tmp")
    (tmp_path / "step-00000020").mkdir()
    (tmp_path / "notes.txt").touch()
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == older
    assert "step-00000020 is not a complete checkpoint: it has no manifest.json" in caplog.text


def test_what_is_not_a_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder; name a checkpoint, a run"):
        latest(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"holds no complete checkpoint; let the run reach its"
    ):
        latest(tmp_path)
    (tmp_path / "step-00000010").mkdir()
    with pytest.raises(
        CheckpointError, match=r"10 is not a complete checkpoint: it has no manifest"
    ):
        latest(tmp_path / "step-00000010")


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (10, 9, 100, 20):
        complete(tmp_path / checkpoint_name(step))
    (tmp_path / "notes.txt").touch()
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["notes.txt", "step-00000020", "step-00000100"]
    prune(tmp_path, keep=1)
    prune(tmp_path, keep=1)
    assert names(tmp_path) == ["notes.txt", "step-00000100"]


def test_later_ones_that_a_run_has_passed_over_push_out_none(tmp_path: Path) -> None:
    """It went on from 100, since 200 and 300 were damaged, and has saved 150."""
    for step in (100, 150, 200, 300):
        complete(tmp_path / checkpoint_name(step))
    prune(tmp_path, keep=2, written=tmp_path / checkpoint_name(150))
    assert names(tmp_path) == ["step-00000100", "step-00000150"]
    complete(tmp_path / checkpoint_name(200))
    prune(tmp_path, keep=1, written=tmp_path / checkpoint_name(150))
    assert names(tmp_path) == ["step-00000150"]


def test_prune_clears_what_a_crash_left(tmp_path: Path) -> None:
    complete(tmp_path / "step-00000010")
    complete(tmp_path / "step-00000020.tmp")
    complete(tmp_path / "step-00000010.old.tmp")
    prune(tmp_path, keep=3)
    assert names(tmp_path) == ["step-00000010"]


def test_an_incomplete_one_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    complete(tmp_path / "step-00000010")
    (tmp_path / "step-00000020").mkdir()
    prune(tmp_path, keep=1)
    assert latest(tmp_path).name == "step-00000010"


def test_what_cannot_be_removed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    complete(tmp_path / "step-00000010")
    complete(tmp_path / "step-00000020")
    (tmp_path / "step-00000030.tmp").touch()  # a file where a folder is expected
    with caplog.at_level(logging.WARNING):
        prune(tmp_path, keep=1)
    assert "could not be removed" in caplog.text
    assert latest(tmp_path).name == "step-00000020"
