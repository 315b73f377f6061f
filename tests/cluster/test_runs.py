"""What a run's folder says."""

import json
import subprocess
import sys
from dataclasses import replace
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


HOLDER = "import sys; file = open(sys.argv[1], 'a'); print(flush=True); input()"


def test_only_the_living_process_that_holds_the_folder_counts(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "train"
    for folder in (run, other):
        folder.mkdir()
        (folder / runs.LOCK).touch()
    command = [sys.executable, "-c", HOLDER, str(run / runs.LOCK), "train"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        state = runs.State(state="running", pid=process.pid)
        assert runs.is_alive(run, state)
        assert not runs.is_alive(other, state)  # a copy of the folder, or a number used again
        assert not runs.is_alive(tmp_path, state)
        assert not any(runs.is_alive(run, replace(state, state=end)) for end in runs.ENDED)
        assert not runs.is_alive(run, replace(state, pid=0))
        process.communicate(b"\n")
    assert not runs.is_alive(run, state)
