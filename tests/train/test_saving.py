"""train.saving: the loop waits for a copy only, and a failed save costs a warning."""

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from gptmoe.checkpoint import open_checkpoint, whole, write
from gptmoe.errors import CheckpointError
from tests.train.test_watchdog import Clock
from train.saving import Saver
from train.watchdog import Watchdog, group_timeout


def saver(
    folder: Path,
    barrier: Callable[[], None] = lambda: None,
    keep: int = 2,
    **given: Any,
) -> Saver:
    return Saver(
        folder,
        rank=0,
        world=1,
        barrier=barrier,
        config={},
        copy_files=lambda path: None,
        keep=keep,
        **given,
    )


def start(saving: Saver, step: int, tensor: torch.Tensor, name: str = "w") -> float:
    groups: Any = {"weights": [whole(name, tensor)]}
    return saving.start(f"step-{step:08d}", groups, {"step": step})


def test_the_loop_may_change_the_weights_while_they_are_written(tmp_path: Path) -> None:
    may_write = threading.Event()
    saving = saver(tmp_path, lambda: may_write.wait(10) and None)
    weights = torch.zeros(4)
    start(saving, 1, weights)
    weights.fill_(7.0)
    assert not (tmp_path / "step-00000001").exists()
    may_write.set()
    saving.finish()
    assert torch.equal(open_checkpoint(tmp_path / "step-00000001").read("w"), torch.zeros(4))
    saving.close()


def test_who_waits_for_a_slow_disk_is_not_taken_for_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.saving._LOOKS_EVERY_S", 0.01)
    clock, ends, slow = Clock(), list[bool](), threading.Event()
    watchdog = Watchdog("train-0", 10.0, lambda: ends.append(True), clock)

    def waits() -> None:
        watchdog.progress()
        clock.now_s += 9.0
        watchdog.look()
        if clock.now_s > 30.0:
            slow.set()

    saving = saver(tmp_path, lambda: slow.wait(10) and None, waits=waits)
    start(saving, 1, torch.zeros(2))
    saving.finish()
    saving.close()
    assert clock.now_s > 30.0
    assert ends == []


def test_all_ranks_wait_for_what_rank_0_does_with_a_new_checkpoint(tmp_path: Path) -> None:
    """A deployment that is refreshed for minutes: the loops of the other ranks wait alike."""
    told: list[str] = []
    saving = saver(
        tmp_path, lambda: told.append("barrier"), saved=lambda folder: told.append(folder.name)
    )
    start(saving, 1, torch.zeros(2))
    saving.finish()
    saving.close()
    assert told[-2:] == ["step-00000001", "barrier"]


def test_a_rank_that_fails_alone_stays_in_step_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is there, but its name may not be on the disk yet: only rank 0 knows."""
    meeting, warnings, failing = threading.Barrier(2, timeout=20), list[str](), [True]
    own = write.commit

    def commit(*given: Any) -> None:
        own(*given)
        if failing and failing.pop():
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(write, "commit", commit)
    savers = [
        saver(tmp_path, lambda: meeting.wait() and None, keep=9, warn=warnings.append) for _ in "01"
    ]
    for rank, one in enumerate(savers):
        one._rank, one._world = rank, 2
    for step in (1, 2, 3):
        for rank, one in enumerate(savers):
            start(one, step, torch.full((2,), float(step)), name=f"w{rank}")
    for one in savers:
        one.finish()
        one.close()
    assert len(warnings) == 1
    assert (tmp_path / "step-00000003" / "manifest.json").is_file()


@pytest.mark.parametrize("hang_s", [0.0, 60.0, 600.0, 86400.0])
def test_collectives_outlast_the_patience_of_the_watchdog(hang_s: float) -> None:
    assert group_timeout(hang_s) >= max(timedelta(hours=2), timedelta(seconds=2 * hang_s))


def test_a_second_save_waits_for_the_first_and_old_ones_are_pruned(tmp_path: Path) -> None:
    saving = saver(tmp_path)
    for step in (1, 2, 3):
        start(saving, step, torch.full((2,), float(step)))
    saving.finish()
    saving.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_damaged_checkpoints_never_push_out_the_one_just_written(tmp_path: Path) -> None:
    (tmp_path / "step-00000300").mkdir()
    (tmp_path / "step-00000300" / "manifest.json").write_text("damaged")
    saving = saver(tmp_path, keep=1)
    for step in (100, 150):
        start(saving, step, torch.zeros(2))
    saving.finish()
    saving.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000150"]


def test_training_goes_on_after_a_failed_save_but_not_after_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving = saver(tmp_path)
    start(saving, 1, torch.zeros(2))
    saving.finish()
    half = torch.zeros(2, dtype=torch.complex64)  # nothing that a checkpoint holds
    start(saving, 2, half)
    with caplog.at_level(logging.WARNING):
        start(saving, 3, half)
    assert "TRAINING GOES ON WITHOUT A NEW CHECKPOINT" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000003 was not saved"):
        saving.finish()
    saving.close()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
