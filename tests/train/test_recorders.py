"""TensorBoard reads what a run wrote, and forgets what a resumed run takes back."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptmoe.metrics import read
from tests.train.test_worker import file_size_limit
from train.recorders import TensorBoardRecorder, make_recorders


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def record(folder: Path, done: int, steps: Sequence[int], loss: float) -> TensorBoardRecorder:
    recorder = TensorBoardRecorder(folder, done)
    for step in steps:
        recorder.record(step, loss=loss, expert_load=[step, 2 * step])
    return recorder


def test_a_number_is_a_curve_and_a_list_one_for_each_entry(tmp_path: Path) -> None:
    record(tmp_path, 0, [1, 2], loss=0.5).close()
    assert curves(tmp_path) == {
        "loss": [(1, 0.5), (2, 0.5)],
        "expert_load/0": [(1, 1.0), (2, 2.0)],
        "expert_load/1": [(1, 2.0), (2, 4.0)],
    }
    assert len(list(tmp_path.iterdir())) == 1


def test_points_are_on_disk_when_a_run_is_killed(tmp_path: Path) -> None:
    recorder = record(tmp_path, 0, [1, 2, 3], loss=0.5)
    assert [step for step, _ in curves(tmp_path)["loss"]] == [1, 2, 3]
    recorder.close()


def test_a_resumed_run_replaces_the_points_after_its_checkpoint(tmp_path: Path) -> None:
    record(tmp_path, 0, [1, 2, 3, 4], loss=0.5).close()
    record(tmp_path, 2, [3, 4, 5], loss=0.25).close()
    assert curves(tmp_path)["loss"] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25)]
    record(tmp_path, 0, [1], loss=0.125).close()  # killed before its first checkpoint
    assert curves(tmp_path)["loss"] == [(1, 0.125)]


def test_a_run_writes_both_files_and_cuts_both(tmp_path: Path) -> None:
    for done, steps in ((0, (1, 2, 3)), (1, (2,))):
        recorders = make_recorders(tmp_path, "tiny-1f2e3d", done)
        for step in steps:
            for recorder in recorders:
                recorder.record(step, loss=0.1 + 0.2 + done, expert_load=[1, 2])
        for recorder in recorders:
            recorder.close()
    assert [(r["step"], r["loss"]) for r in read(tmp_path / "metrics.jsonl")] == [
        (1, 0.1 + 0.2),
        (2, 0.1 + 0.2 + 1),
    ]
    assert [step for step, _ in curves(tmp_path / "tensorboard")["loss"]] == [1, 2]


# TensorBoard's own thread raises what it meets, beside telling the recorder.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_curves_that_find_no_room_end_with_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    recorder = TensorBoardRecorder(tmp_path, 0, warnings.append)
    recorder.record(1, loss=0.5)
    (file,) = tmp_path.iterdir()
    with file_size_limit(file.stat().st_size + 10):
        for step in (2, 3, 4):
            recorder.record(step, loss=0.5)
    recorder.close()
    assert warnings == ["TensorBoard's curves end at step 1: File too large"]
