"""Ends a worker that hangs, so that the others learn of it and the run can start them again.

A hung worker leaves its peers waiting in a collective, which looks the same from outside. Those
that wait are given twice the time: the one that does not wait is the cause, and ends first.
"""

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

log = logging.getLogger(__name__)

_LOOKS_EVERY_S = 1.0
_LEAST_GROUP_TIMEOUT = timedelta(hours=2)
_NO_LIMIT = timedelta(days=7)
_COLLECTIVES = os.path.join("torch", "distributed")


class Watchdog:
    """Watches the thread that made it, inside a `with`; `limit_s` = 0 switches it off."""

    def __init__(
        self,
        worker: str,
        limit_s: float,
        end: Callable[[], None] = lambda: os._exit(1),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._limit_s = limit_s
        self._end = end
        self._clock = clock
        self._watched = threading.get_ident()
        self._progress_at_s = clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._progress_at_s = self._clock()
        if self._limit_s:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def progress(self) -> None:
        """The watched thread has got on."""
        self._progress_at_s = self._clock()

    def look(self) -> bool:
        """End the process if it hangs; True if it was ended."""
        silent_s = self._clock() - self._progress_at_s
        if silent_s < self._limit_s:
            return False
        frame = sys._current_frames().get(self._watched)
        if silent_s < 2 * self._limit_s and waits_for_others(frame):
            return False
        place = "".join(traceback.format_stack(frame)[-3:]) if frame else "its thread is gone\n"
        log.error(
            "worker %s hangs: no progress for %.0f s; its process ends, the others go on without "
            "it. It was at\n%s",
            self._worker,
            silent_s,
            place,
        )
        self._end()
        return True

    def _watch(self) -> None:
        while not self._over.wait(min(_LOOKS_EVERY_S, self._limit_s / 4)):
            if self.look():
                return


def group_timeout(limit_s: float) -> timedelta:
    """How long a collective waits before it gives up: the watchdog is to be the first to judge.

    Hours, since threads that write checkpoints to a slow disk meet in a group, too.
    """
    return max(_LEAST_GROUP_TIMEOUT, timedelta(seconds=3 * limit_s)) if limit_s else _NO_LIMIT


def waits_for_others(frame: FrameType | None) -> bool:
    """Whether a thread is inside a collective, and so perhaps not to blame."""
    while frame is not None:
        if _COLLECTIVES in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
