"""gptmoe stop, pretrain and the like on runs and jobs, in this process and without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import training

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
