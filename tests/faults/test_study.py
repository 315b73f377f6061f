"""A study that is killed goes on by the same command: nothing twice, and the same numbers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import env
from gptmoe.metrics import read
from train.study.launch import last_step
from train.study.order import read_done

TINY = env.ROOT / "configs" / "study" / "tiny.toml"
WITHIN_S = 300.0
DENSE, SWITCH = "dense-seed-0", "switch-4-seed-0"


def command(folder: Path, *more: str) -> list[str]:
    overrides = [
        f"study.dir={folder}", 'study.arms=["dense","switch"]', "study.seeds=[0]",
        "study.parallel=1", "study.speed_steps=0", "train.max_steps=60",
        "train.validate_every_steps=20", "checkpoint.every_steps=5",
    ]  # fmt: skip
    return [sys.executable, "-m", "train.study", str(TINY), *overrides, *more]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = env.child_environment(starts_cluster=False)
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not is_so():
        assert process.poll() is None, "the study ended early"
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def losses(folder: Path, name: str) -> list[tuple[int, float]]:
    records = read(folder / "runs" / name / "metrics.jsonl")
    return [(r["step"], r["lm_loss"]) for r in records if "lm_loss" in r]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study without an accident, in plain processes."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    done = run(command(folder))
    assert done.returncode == 0, done.stderr
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "switch-4 comes to the final loss of dense" in (folder / "page.md").read_text()
    return folder


def test_killed_in_its_second_arm(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    environment = env.child_environment(starts_cluster=False)
    with subprocess.Popen(command(folder), env=environment, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: last_step(folder / "runs" / SWITCH / "metrics.jsonl") >= 8, process)
        os.kill(process.pid, signal.SIGKILL)
    finished = (folder / "runs" / DENSE / "done.json").stat().st_mtime_ns
    assert not (folder / "runs" / SWITCH / "done.json").exists()

    again = run(command(folder))
    assert again.returncode == 0, again.stderr
    assert "1 of 2 runs are left" in again.stderr
    assert (folder / "runs" / DENSE / "done.json").stat().st_mtime_ns == finished
    for name in (DENSE, SWITCH):
        mine, its = (read_done(study / "runs" / name) for study in (folder, whole))
        assert mine == its
        assert losses(folder, name) == losses(whole, name)


def test_a_study_in_pieces_of_time(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    codes = []
    while len(codes) < 20 and 0 not in codes:
        codes.append(run(command(folder, "--minutes", "0.15")).returncode)
    assert codes[-1] == 0
    assert set(codes[:-1]) <= {75}
    assert [read_done(folder / "runs" / name) for name in (DENSE, SWITCH)] == [
        read_done(whole / "runs" / name) for name in (DENSE, SWITCH)
    ]
