"""A deployment that follows a run."""

import math
from pathlib import Path

from cluster.client import GenerationError
from gptmoe.metrics import JsonlRecorder
from train.refresh import Refresher, best_validation, kept, owed


def checkpoint(run_dir: Path, name: str) -> Path:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(name)
    return folder


def served(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "served").iterdir())


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
    assert served(tmp_path) == ["current", "step-00000003"]


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
    assert served(tmp_path) == ["current", calls[1].name]


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


def test_a_deployment_that_is_slow_is_told_once(tmp_path: Path) -> None:
    calls, warnings = list[Path](), list[str]()

    def refresh(folder: Path) -> None:
        calls.append(folder)
        raise GenerationError("DEADLINE_EXCEEDED", "not all have changed, and it goes on")

    follower = Refresher(tmp_path, math.inf, refresh, warnings.append)
    assert follower.improves(3.0, "step-00000001")
    for name in ("step-00000001", "step-00000002"):
        follower.saved(checkpoint(tmp_path, name))
    assert [path.name for path in calls] == ["step-00000001"]
    assert len(warnings) == 1
    assert "takes step-00000001 slowly" in warnings[0]


def test_a_refresh_that_failed_is_made_up_for_at_the_next_checkpoint(tmp_path: Path) -> None:
    calls: list[Path] = []
    gone = True

    def refresh(folder: Path) -> None:
        if gone:
            raise GenerationError("UNAVAILABLE", "nobody there")
        calls.append(folder)

    follower = Refresher(tmp_path, math.inf, refresh, lambda reason: None)
    assert follower.improves(3.0, "step-00000001")
    follower.saved(checkpoint(tmp_path, "step-00000001"))
    gone = False
    for name in ("step-00000002", "step-00000003"):  # these improve nothing
        follower.saved(checkpoint(tmp_path, name))
    assert [path.name for path in calls] == ["step-00000001"]
    assert served(tmp_path) == ["current", "step-00000001"]


def test_a_run_that_was_cut_off_owes_the_deployment_its_best(tmp_path: Path) -> None:
    best = checkpoint(tmp_path, "step-00000020")
    assert owed(tmp_path, "step-00000010") is None  # pruned, and not kept
    assert owed(tmp_path, "step-00000020") == best
    calls: list[Path] = []
    follower = Refresher(tmp_path, 2.0, calls.append, owed=best)
    follower.saved(checkpoint(tmp_path, "step-00000025"))
    assert [path.name for path in calls] == ["step-00000020"]
    assert owed(tmp_path, "step-00000020") is None
    assert owed(tmp_path, "step-00000010") is None  # what it has is better
    assert owed(tmp_path, checkpoint(tmp_path, "step-00000030").name) is not None


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
    assert best_validation(tmp_path, 20) == (2.0, 20)
    assert best_validation(tmp_path, 0) == (math.inf, 0)
