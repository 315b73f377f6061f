"""Calls that Python cannot interrupt, made in a thread that can be left behind."""

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")

_NAME = "within"


def within(timeout_s: float | None, call: Callable[[], T]) -> T:
    """What `call` returns or raises; TimeoutError if it takes longer. Ctrl-C ends the wait."""
    answers: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def answer() -> None:
        try:
            answers.put((True, call()))
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            answers.put((False, error))

    threading.Thread(target=answer, name=_NAME, daemon=True).start()
    try:
        good, result = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError from None
    if good:
        return cast(T, result)
    raise result


def left_behind() -> bool:
    """Whether a call is still under way that nobody waits for."""
    return any(thread.name == _NAME for thread in threading.enumerate())
