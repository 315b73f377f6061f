"""A run's folder: claimed by one process, and saying how that process ended."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import runs
from gptmoe.data import Progress
from gptmoe.errors import ClusterError, ConfigError, DataError
from train.state import GO_ON, StateFile, claimed


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def test_a_change_keeps_the_rest_and_the_watchers_read_it(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    state.write(max_steps=40)
    state.write(state="running", dashboard_url="http://127.0.0.1:8265", message="春")
    assert runs.read_state(tmp_path) == runs.State(
        state="running",
        message="春",
        max_steps=40,
        dashboard_url="http://127.0.0.1:8265",
        pid=os.getpid(),
    )
    assert state_of(tmp_path)["job_id"] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_inside_a_job_its_id_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"metadata": {"job_submission_id": "pretrain-a-1f2e3d"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    StateFile(tmp_path).write()
    assert state_of(tmp_path)["job_id"] == "pretrain-a-1f2e3d"


def test_progress_is_said_now_and_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateFile(tmp_path)
    monkeypatch.setattr("train.state._SAY_EVERY_S", 3600)
    state._say_at_s = 0.0
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            state.preparing(Progress(fraction=0.354, documents=12345, tokens=1_000_000))
    assert caplog.messages == ["preparing the data: 35%, 12,345 documents, 1,000,000 tokens"]
    assert state_of(tmp_path)["message"] == "preparing the data: 35%, 12,345 documents"


def fail(error: BaseException | None) -> Callable[[], None]:
    def body() -> None:
        if error is not None:
            raise error

    return body


@pytest.mark.parametrize(
    ("error", "name", "message"),
    [
        (None, "finished", ""),
        (DataError("poems.txt is empty"), "failed", "poems.txt is empty"),
        (KeyboardInterrupt(), "interrupted", GO_ON),
        (SystemExit(15), "interrupted", GO_ON),
        (RuntimeError("a bug"), "failed", "unexpected RuntimeError: a bug"),
    ],
    ids=["finished", "failed", "ctrl-c", "sigterm", "bug"],
)
def test_every_end_is_recorded(
    tmp_path: Path, error: BaseException | None, name: str, message: str
) -> None:
    def run() -> None:
        with claimed(tmp_path / "run") as state:
            assert state_of(tmp_path / "run")["state"] == "preparing"
            state.write(state="running", max_steps=7)
            fail(error)()

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    found = state_of(tmp_path / "run")
    assert (found["state"], found["message"], found["max_steps"]) == (name, message, 7)


HOLDER = """
import sys, time
from pathlib import Path
from train.state import claimed
with claimed(Path(sys.argv[1])) as state:
    state.write(state="running", max_steps=3)
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_has_one_run_at_a_time_even_after_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = pytest.raises(
            ClusterError, match=rf"process {holder.pid} on .* is training in .*, stop it, or"
        )
        with refused, claimed(tmp_path):
            pass
        assert state_of(tmp_path)["state"] == "running"  # the other run's word stands
        assert state_of(tmp_path)["pid"] == holder.pid
        holder.kill()
    with claimed(tmp_path):
        assert state_of(tmp_path)["pid"] == os.getpid()


ORPHAN = """
import sys
from pathlib import Path
from train.state import writing
with writing(Path(sys.argv[1])):
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_run_waits_for_workers_that_outlive_their_starter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    command = [sys.executable, "-c", ORPHAN, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as orphan:
        assert orphan.stdin is not None
        assert orphan.stdout is not None
        assert orphan.stdout.readline() == "writing\n"
        monkeypatch.setattr("train.state._ORPHANS_LIVE_S", 0.1)
        refused = pytest.raises(ClusterError, match=f"process {orphan.pid} on .* is training in")
        with refused, claimed(tmp_path):
            pass
        monkeypatch.setattr("train.state._ORPHANS_LIVE_S", 60.0)
        caplog.clear()
        threading.Timer(0.3, orphan.stdin.close).start()
        with claimed(tmp_path):
            assert orphan.wait(timeout=10) == 0
    assert [message.partition(" on ")[0] for message in caplog.messages] == [
        f"waits for process {orphan.pid}"
    ]


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with claimed(tmp_path):
        assert state_of(tmp_path)["state"] == "preparing"
    assert "this file system has no locks; start no second run there" in caplog.text


@pytest.mark.parametrize("key", ["run.dir", "study.dir"])
@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_a_place_that_cannot_hold_a_run_is_refused(tmp_path: Path, place: str, key: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(ConfigError, match=rf"{key}=.* cannot be written: .*; choose another folder"),
        claimed(tmp_path / place, key),
    ):
        pass
