"""Follows a run that another process does: its metrics.jsonl and state.json, drawn as they grow.

The job writes numbers, whoever started it draws them; so a run looks the same from a terminal, from
a log file (plain lines) and from another machine that sees the folder.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from gptmoe.errors import ClusterError

from . import runs, topology_file
from .messages import Failure

POLL_S = 0.2
_PLAIN_EVERY_S = 5.0


class Tail:
    """The records added to a metrics.jsonl since the last look.

    A run that goes on first replaces the file by its beginning: what the new file holds then is
    known already and is passed over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = self._end()

    def new(self) -> Iterator[dict[str, Any]]:
        """Records that are complete and were not there before."""
        inode, end = self._end()
        if self._inode and inode != self._inode:
            self._offset = end
        self._inode = inode
        if end <= self._offset:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                with contextlib.suppress(json.JSONDecodeError):
                    yield json.loads(line)

    def _end(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_size


class _Failures:
    """What has failed in a run since the last look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: set[Failure] = set()
        self._known = set(self.new())

    def new(self) -> list[Failure]:
        try:
            topology = topology_file.read(self._folder)
        except ClusterError:  # `gptmoe status` says what is wrong with it
            return []
        found = [f for f in topology.failures if f not in self._known] if topology else []
        self._known.update(found)
        return found


def follow(folder: Path, console: Console, is_over: Callable[[], bool]) -> None:
    """Draw the run in `folder` until `is_over`, and what came in until then.

    A bar with loss, tokens/s and time left on a terminal; a line every few seconds elsewhere.
    """
    tail, failures = Tail(folder / "metrics.jsonl"), _Failures(folder)
    before = runs.read_state(folder)
    view = _Bar(console) if console.is_terminal else _Lines(console)
    with view:
        while True:
            over = is_over()
            if (state := runs.read_state(folder)) != before:  # not what an earlier run left
                view.state(state)
            for failure in failures.new():
                view.failure(failure)
            for record in tail.new():
                view.record(record)
            if over:
                return
            time.sleep(POLL_S)


def describe(record: Mapping[str, Any]) -> str:
    """The numbers of a record in words: `loss 3.2130  1,850 tokens/s`."""
    return "  ".join(text.format(record[name]) for name, text in _FORMATS.items() if name in record)


_FORMATS = {
    "loss": "loss {:.4f}",
    "val_loss": "validation loss {:.4f}",
    "bits_per_char": "{:.3f} bits per character",
    "tokens_per_s": "{:,.0f} tokens/s",
}


class _Lines:
    """Plain lines: a validation and a step every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._state = ""
        self._due_at_s = {"val_loss": 0.0, "loss": 0.0}

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def state(self, state: runs.State) -> None:
        if state.state != self._state:
            self._state = state.state
            self._print(f"{state.state} {state.dashboard_url}".strip())

    def failure(self, failure: Failure) -> None:
        self._print(Text(str(failure), style="yellow"))

    def record(self, record: Mapping[str, Any]) -> None:
        kind = "val_loss" if "val_loss" in record else "loss"
        if time.monotonic() >= self._due_at_s[kind]:
            self._due_at_s[kind] = time.monotonic() + _PLAIN_EVERY_S
            self._print(f"step {record['step']}  {describe(record)}")

    def _print(self, text: str | Text) -> None:
        self._console.print(text, highlight=False)


class _Bar(_Lines):
    """A bar at the bottom of a terminal; validations scroll by above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=None, numbers="")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def state(self, state: runs.State) -> None:
        self._progress.update(
            self._task, description=state.state or "starting", total=state.max_steps or None
        )

    def record(self, record: Mapping[str, Any]) -> None:
        if "val_loss" in record:
            self._print(f"step {record['step']}  {describe(record)}")
        if "loss" in record:
            self._progress.update(self._task, completed=record["step"], numbers=describe(record))
