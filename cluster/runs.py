"""What a run's folder says about the run: state.json and metrics.jsonl. No Ray, no torch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptmoe import metrics
from gptmoe.errors import ClusterError

ENDED = ("finished", "failed", "interrupted")
LOCK = ".lock"
"""The file of a run's folder that the process holds open that trains in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """state.json, as the run wrote it last; `state` is empty before it did."""

    state: str = ""
    message: str = ""
    max_steps: int = 0
    cluster_address: str = ""
    dashboard_url: str = ""
    job_id: str = ""
    pid: int = 0


def read_state(folder: Path) -> State:
    """What the run in `folder` says that it is doing. Raises ClusterError for a damaged file."""
    path = folder / "state.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return State(**{key: raw[key] for key in raw.keys() & State.__dataclass_fields__.keys()})
    except FileNotFoundError:
        return State()
    except (OSError, ValueError, AttributeError) as error:
        raise ClusterError(f"{path} cannot be read ({error}); remove it") from None


def newest_metrics(folder: Path) -> dict[str, Any]:
    """The last value of each number that the run has recorded. Raises DataError for a bad line."""
    newest: dict[str, Any] = {}
    for record in metrics.read(folder / "metrics.jsonl"):
        newest |= record
    return newest


def is_run(folder: Path) -> bool:
    """Whether a run was started in `folder`."""
    return (folder / "state.json").is_file() or (folder / "metrics.jsonl").is_file()


def is_alive(folder: Path, state: State) -> bool:
    """Whether the run in `folder` goes on in a process of this machine, and of this user.

    A number alone says little: another run or program may have it by now, here or on the machine
    that wrote it. But only the process that trains in a folder holds that folder's lock open.
    """
    if state.pid <= 0 or state.state in ENDED:
        return False
    try:
        lock = (folder / LOCK).stat()
        return any(_is(file, lock) for file in Path(f"/proc/{state.pid}/fd").iterdir())
    except OSError:
        return False


def _is(file: Path, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(file.stat(), wanted)
    except OSError:  # closed since it was listed
        return False
