"""A deployment that follows a run."""

import math
from pathlib import Path

import pytest

from cluster.client import GenerationError
from gptmoe.metrics import JsonlRecorder
from train.refresh import Refresher, best_loss, kept


def checkpoint(run_dir: Path, name: str) -> Path:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(name)
    return folder


def test_only_what_improves_is_served(tmp_path: Path) -> None:
    calls: list[Path] = []
    follower = Refresher(tmp_path, math.inf, calls.append)
    assert follower.improves(3.0, "step-00000001")
    follower.saved(checkpoint(tmp_path, "step-00000001"))
    assert not follower.improves(3.0, "step-00000002")
    assert not follower.improves(math.nan, "step-00000002")
    follower.saved(checkpoint(tmp_path, "step-00000002"))  # saved for another reason
    assert follower.improves(2.5, "step-00000003")
    follower.saved(checkpoint(tmp_path, "step-00000003"))
    assert [path.name for path in calls] == ["step-00000001", "step-00000003"]
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["step-00000003"]


def test_what_is_served_outlives_the_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "step-00000001")
    copy = kept(folder, tmp_path / "served")
    assert (copy / "manifest.json").stat().st_ino == (folder / "manifest.json").stat().st_ino
    assert kept(folder, tmp_path / "served") == copy
    (folder / "manifest.json").unlink()
    assert (copy / "manifest.json").read_text() == "step-00000001"


def test_a_step_made_anew_is_not_taken_for_the_one_that_is_served(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "step-00000001")
    calls: list[Path] = []
    follower = Refresher(tmp_path, math.inf, calls.append)
    assert follower.improves(3.0, folder.name)
    follower.saved(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text("other weights")
    assert follower.improves(2.5, folder.name)
    follower.saved(folder)
    assert calls[0] != calls[1]
    assert (calls[1] / "manifest.json").read_text() == "other weights"
    assert [*(tmp_path / "served").iterdir()] == [calls[1]]


def test_a_deployment_that_is_gone_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []

    def refresh(folder: Path) -> None:
        raise GenerationError("UNAVAILABLE", "nobody there")

    follower = Refresher(tmp_path, math.inf, refresh, warnings.append)
    assert follower.improves(3.0, "step-00000001")
    follower.saved(checkpoint(tmp_path, "step-00000001"))
    assert warnings == [
        "TRAINING GOES ON, THE DEPLOYMENT KEEPS ITS WEIGHTS: UNAVAILABLE: nobody there"
    ]


def test_other_ranks_agree_and_stay_silent(tmp_path: Path) -> None:
    follower = Refresher(tmp_path, 2.0, None)
    assert follower.improves(1.0, "step-00000001")
    follower.saved(checkpoint(tmp_path, "step-00000001"))
    assert not (tmp_path / "served").exists()


def test_a_run_that_goes_on_remembers_its_best(tmp_path: Path) -> None:
    recorder = JsonlRecorder(tmp_path / "metrics.jsonl")
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0)):
        recorder.record(step, val_loss=loss)
    recorder.close()
    assert best_loss(tmp_path, 20) == pytest.approx(2.0)
    assert best_loss(tmp_path, 0) == math.inf
