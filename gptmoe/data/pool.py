"""A `map` over processes whose results come in order, whatever the number of processes."""

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar, cast

from gptmoe.errors import GptMoeError

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Like `map`, in `workers` processes (0 or 1: in this one), reading one item ahead of each
    process.

    `function` is pickled once to each process, items and results for each call. An exception of
    `function` is raised here. Processes are spawned, not forked, since a fork copies the locks of
    other threads; a script that calls this therefore needs `if __name__ == "__main__":`.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    crew: list[_Worker[T, R]] = []
    try:
        crew += [_Worker(function) for _ in range(workers)]
        idle, busy = deque(crew), deque[_Worker[T, R]]()
        for item in items:
            results = []
            if not idle:
                results.append(busy[0].receive())
                idle.append(busy.popleft())
            idle[0].send(item)
            busy.append(idle.popleft())
            yield from results  # after the send: the process works while the caller does
        for worker in busy:
            yield worker.receive()
    finally:
        for worker in crew:
            worker.stop()


class _Worker(Generic[T, R]):
    """A process that applies a function to what it is sent, one item at a time."""

    def __init__(self, function: Callable[[T], R]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        # Ctrl-C reaches the whole process group; children inherit the block, the parent decides.
        resource_tracker.ensure_running()  # else `start` does it, and lifts the block
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the end of the process ends the connection

    def send(self, item: T) -> None:
        try:
            self._connection.send(item)
        except OSError:
            raise self._died() from None

    def receive(self) -> R:
        try:
            result, error = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if error is not None:
            raise error
        return cast(R, result)

    def stop(self) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join()
        self._process.close()

    def _died(self) -> GptMoeError:
        self._process.join()
        return GptMoeError(
            f"a worker process ended with exit code {self._process.exitcode}; if memory ran out "
            "(-9) use fewer workers, if a script started it (1) guard that script with "
            '`if __name__ == "__main__":`'
        )


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            connection.send(_outcome(function, connection.recv()))


def _outcome(function: Callable[[T], R], item: T) -> tuple[R | None, Exception | None]:
    try:
        return function(item), None
    except Exception as error:  # noqa: BLE001  raised again in the parent
        return None, error
