"""`python -m train ...` and `python -m serve ...` as an attached child process.

The child leads a process group of its own: Ctrl-C on the terminal reaches this process only, which
hands it on, once. A second Ctrl-C kills the child; its local Ray cluster dies with it. Should this
process be killed, the child notices: nobody writes to its standard input, whose end is ours.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from . import env

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LAST_LINES_S = 5.0  # a grandchild may hold the pipe open for longer


class Child:
    """A running `python -m MODULE ...`."""

    def __init__(self, words: Sequence[str], on_line: Callable[[str], None] | None = None) -> None:
        """Start it; `on_line` gets each line that it prints, without it the terminal does."""
        pipe = subprocess.PIPE if on_line else None
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=env.child_environment(starts_cluster=True) | {env.ATTACHED: "1"},
            process_group=0,
            stdin=subprocess.PIPE,
            stdout=pipe,
            stderr=subprocess.STDOUT if on_line else None,
        )
        self.pid = self._process.pid
        self._interrupts = 0
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Wait for the end; returns the exit code as a shell counts it (128 + signal)."""
        code = self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self._reader.join(_LAST_LINES_S)
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
            self.wait()
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

    def _read(self, on_line: Callable[[str], None] | None) -> None:
        if on_line is None or self._process.stdout is None:
            return
        with self._process.stdout as lines:
            for line in lines:
                on_line(line.decode(errors="replace").rstrip("\r\n"))


def end_with_parent() -> None:
    """In a Child: end, as by SIGTERM, when the process that started it has gone without a word."""
    if env.take_attached():
        threading.Thread(target=_await_end_of_input, name="parent", daemon=True).start()


def _await_end_of_input() -> None:
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
