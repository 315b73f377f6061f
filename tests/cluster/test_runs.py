"""What a run's folder says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import runs
from gptmoe.errors import ClusterError, DataError


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    assert not runs.is_run(tmp_path)
    assert runs.read_state(tmp_path) == runs.State()
    assert runs.newest_metrics(tmp_path) == {}


def test_the_state_may_have_more_keys_than_we_know(tmp_path: Path) -> None:
    raw = {"state": "running", "max_steps": 40, "pid": 7, "new": True}
    (tmp_path / "state.json").write_text(json.dumps(raw))
    assert runs.is_run(tmp_path)
    assert runs.read_state(tmp_path) == runs.State(state="running", max_steps=40, pid=7)


@pytest.mark.parametrize("text", ["", "[]", "nonsense"])
def test_a_damaged_state_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ClusterError, match=r"state\.json cannot be read .*; remove it"):
        runs.read_state(tmp_path)


def test_the_newest_value_of_each_number(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 3.5}', '{"step": 1, "val_loss": 3.0}', '{"step": 2, "loss": 2.5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    assert runs.newest_metrics(tmp_path) == {"step": 2, "loss": 2.5, "val_loss": 3.0}
    (tmp_path / "metrics.jsonl").write_text("\n".join(["broken", *lines]))
    with pytest.raises(DataError, match="line 1"):
        runs.newest_metrics(tmp_path)


def test_only_a_living_training_process_counts() -> None:
    assert not runs.is_alive(runs.State(pid=0))
    for word in ("train", "else"):  # the latter lives, but does not train
        command = [sys.executable, "-c", "print(flush=True); input()", word]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert runs.is_alive(runs.State(pid=process.pid)) == (word == "train")
            process.communicate(b"\n")
        assert not runs.is_alive(runs.State(pid=process.pid))
