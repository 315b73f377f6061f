"""A running `python -m train ...`, and how it ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from cluster import env
from gptmoe import metrics

WITHIN_S = 400


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    """Since it was told to end, or started."""

    @property
    def last_line(self) -> str:
        return self.stderr.splitlines()[-1]


class Command:
    """A running `python -m train ...` in a process group of its own."""

    def __init__(self, folder: Path, *words: str, **variables: str) -> None:
        self._files = [(folder / name).open("w+") for name in ("stdout", "stderr")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train", *words],
            cwd=env.ROOT,
            env=env.child_environment(starts_cluster=True) | variables,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
        )

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """AssertionError with what it said if it ends, or takes too long."""
        deadline_s = time.monotonic() + WITHIN_S
        while not is_so():
            if not self.is_running() or time.monotonic() > deadline_s:
                raise AssertionError(self.end(signal.SIGKILL).stderr)
            time.sleep(0.1)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """SIGKILL goes to the whole process group, others to the process."""
        if number == signal.SIGKILL:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def end(self, number: signal.Signals | None = None) -> Ended:
        """Wait for its end, after a signal if one is given."""
        began_s = time.monotonic()
        try:
            if number is not None:
                self.send(number)
            code = self._process.wait(timeout=WITHIN_S)
        except BaseException:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise
        seconds = time.monotonic() - began_s
        stdout, stderr = (read(file) for file in self._files)
        return Ended(code, stdout, stderr, seconds)


def read(file: TextIO) -> str:
    with file:
        file.seek(0)
        return file.read()


def newest_step(run_dir: Path) -> int:
    records = metrics.read(run_dir / "metrics.jsonl")
    return int(records[-1]["step"]) if records else 0


def losses(records: list[dict[str, float]]) -> dict[float, float]:
    """Of the records of a run, the training loss of each step."""
    return {record["step"]: record["loss"] for record in records if "loss" in record}
