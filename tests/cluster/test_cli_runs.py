"""gptmoe stop, pretrain and the like on runs and jobs, in this process and without Ray."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import jobs
from cluster.cli import training
from gptmoe.errors import ClusterError

from .conftest import Run


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("running", "is not running on this machine under your name; stop it where it was started"),
        ("failed", "has ended already: it is failed"),
    ],
)
def test_stop_interrupts_nobody_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, expected: str
) -> None:
    """The run's process is gone, and another run's now has its number."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    command = [sys.executable, "-c", "print(flush=True); input()", "train"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        (tmp_path / ".lock").touch()
        (tmp_path / "state.json").write_text(json.dumps({"state": state, "pid": process.pid}))
        assert run("stop", str(tmp_path)) == (2, "", f"error: the run in {tmp_path} {expected}\n")
        process.communicate(b"\n")
    assert killed == []


def test_a_config_may_stand_behind_overrides(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child that trains wants it first."""
    given: list[list[str]] = []
    monkeypatch.setattr(training, "_run_child", lambda words, folder: given.append(words) or 3)
    folder = f"run.dir={tmp_path / 'run'}"
    assert run("pretrain", folder, "configs/train/tiny.toml", "parallel.ep=2") == (3, "", "")
    assert given == [["train", "pretrain", "configs/train/tiny.toml", folder, "parallel.ep=2"]]


@dataclass
class Followed:
    """A cluster whose job prints, and then does what `then` does."""

    then: Callable[[], None]
    url: str = "http://head:8265"
    status: str = "FAILED"

    def follow(self, job_id: str) -> Iterator[str]:
        yield "step [1]\n"
        self.then()

    def job(self, job_id: str) -> Any:
        return SimpleNamespace(status=self.status, driver_exit_code=7)


JOB = SimpleNamespace(run_dir="")


def lose() -> None:
    raise ClusterError("no Ray cluster answers at http://head:8265")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "submit", lambda dashboard, job: "pretrain-a")


@pytest.mark.usefixtures("submitted")
def test_a_job_hands_back_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert training.run_job(Followed(then=lambda: None), JOB) == 7
    assert capsys.readouterr().err == "job pretrain-a on http://head:8265\nstep [1]\n"


@pytest.mark.usefixtures("submitted")
@pytest.mark.parametrize(
    ("then", "error"),
    [(lose, ClusterError), (interrupt, KeyboardInterrupt)],
    ids=["lost", "ctrl-c"],
)
def test_a_job_that_is_left_goes_on_and_the_hint_works(
    capsys: pytest.CaptureFixture[str], then: Callable[[], None], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        training.run_job(Followed(then=then), JOB)
    hint = "gptmoe stop pretrain-a --address http://head:8265"
    assert capsys.readouterr().err.endswith(f"job pretrain-a goes on; to stop it: {hint}\n")
