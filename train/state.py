"""A run's folder while a process trains in it: claimed by that process alone, its state on disk."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from cluster import env
from cluster.runs import LOCK
from gptmoe.data import Progress
from gptmoe.errors import ClusterError, ConfigError, GptMoeError

log = logging.getLogger(__name__)

GO_ON = "start the same command again to go on from the last checkpoint"
WRITER_LOCK = ".lock-writer"
_ORPHANS_LIVE_S = 60.0
_SAY_EVERY_S = 2.0


Name = Literal["preparing", "running", "finished", "failed", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One moment of a run."""

    state: Name
    message: str = ""
    max_steps: int = 0
    cluster_address: str = ""
    dashboard_url: str = ""
    job_id: str = ""
    pid: int = 0


class StateFile:
    """state.json of a run's folder: what the run is doing, for whoever watches it."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._now = State(state="preparing", job_id=env.job_id(), pid=os.getpid())
        self._say_at_s = time.monotonic() + _SAY_EVERY_S

    def write(self, **changes: Any) -> None:
        """Change some of the state; the others stay."""
        self._now = dataclasses.replace(self._now, **changes)
        replace_json(self._run_dir / "state.json", asdict(self._now))

    def end(self, state: Name, message: str = "") -> None:
        """Write how it ended, if that can be written: a full disk must not hide what went wrong."""
        with contextlib.suppress(OSError):
            self.write(state=state, message=message)

    def preparing(self, progress: Progress) -> None:
        """Say how far the preparation of the data is, every few seconds."""
        if time.monotonic() >= self._say_at_s:
            self._say_at_s = time.monotonic() + _SAY_EVERY_S
            done = f"{progress.fraction:.0%}, {progress.documents:,} documents"
            log.info("preparing the data: %s, %s tokens", done, f"{progress.tokens:,}")
            self.write(message=f"preparing the data: {done}")


@contextlib.contextmanager
def claimed(run_dir: Path, key: str = "run.dir") -> Iterator[StateFile]:
    """Hold a run's folder for this process, and record in state.json how the block ends.

    `key` is what errors call the folder: the key of the config that names it.
    Waits for workers that outlive a killed process by seconds. Raises ClusterError if another
    process holds the folder, ConfigError if it cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(run_dir / LOCK, key, wait_s=0.0))
            with _locked(run_dir / WRITER_LOCK, key, wait_s=_ORPHANS_LIVE_S):
                pass
            state = StateFile(run_dir)
            state.write()
        except OSError as error:
            raise ConfigError(
                f"{key}={run_dir} cannot be written: {error.strerror}; choose another folder"
            ) from None
        with _ending(state):
            yield state


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Held by the worker that writes metrics and commits checkpoints, as long as it lives."""
    # The one before may be ending.
    with _locked(run_dir / WRITER_LOCK, "run.dir", wait_s=_ORPHANS_LIVE_S):
        yield


@contextlib.contextmanager
def _locked(path: Path, key: str, wait_s: float) -> Iterator[None]:
    """The system drops the lock when the process ends, however it ends."""
    with path.open("a+", encoding="utf-8") as file:
        deadline_s = time.monotonic() + wait_s
        said = False
        while not _take(file):
            file.seek(0)
            holder = file.read() or "another process"
            if time.monotonic() >= deadline_s:
                raise ClusterError(
                    f"{holder} is training in {path.parent}; "
                    f"wait for its end, stop it, or choose another {key}"
                )
            if not said:
                log.info("waits for %s, left from an earlier start, to end", holder)
                said = True
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _take(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        log.warning("%s: this file system has no locks; start no second run there", file.name)
    return True


@contextlib.contextmanager
def _ending(state: StateFile) -> Iterator[None]:
    try:
        yield
    except GptMoeError as error:
        state.end("failed", str(error))
        raise
    except (KeyboardInterrupt, SystemExit):
        state.end("interrupted", GO_ON)
        raise
    except BaseException as error:
        state.end("failed", f"unexpected {type(error).__name__}: {error}")
        raise
    state.end("finished")


def replace_json(path: Path, plain: dict[str, Any]) -> None:
    """Write a JSON file in one rename: readers see the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(plain, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
