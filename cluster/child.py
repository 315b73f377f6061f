"""`python -m train ...` and `python -m serve ...` as an attached child process.

The child leads a process group of its own: Ctrl-C on the terminal reaches this process only, which
hands it on, once. A second Ctrl-C kills the child; its local Ray cluster dies with it.
"""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import IO

from . import env

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Child:
    """A running `python -m MODULE ...`."""

    def __init__(self, words: Sequence[str], on_line: Callable[[str], None] | None = None) -> None:
        """Start it; `on_line` gets each line that it prints, without it the terminal does."""
        pipe = subprocess.PIPE if on_line else None
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=env.child_environment(starts_cluster=True),
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=subprocess.STDOUT if on_line else None,
        )
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        if on_line:
            self._reader.start()
        self._interrupts = 0

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Wait for the end; returns the exit code as a shell counts it (128 + signal)."""
        code = self._process.wait()
        if self._process.stdout:
            self._reader.join(timeout=5.0)  # a grandchild may hold the pipe open
        return 128 - code if code < 0 else code

    @contextlib.contextmanager
    def attached(self) -> Iterator["Child"]:
        """Hand signals on to the child within the block; at its end the child is gone."""
        before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            yield self
        finally:
            if not self.has_ended():
                self._process.terminate()
            self._process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.has_ended():
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._process.kill()
        else:
            self._process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _read(self, on_line: Callable[[str], None]) -> None:
        stream: IO[bytes] | None = self._process.stdout
        assert stream is not None
        for line in stream:
            on_line(line.decode(errors="replace").rstrip("\r\n"))
