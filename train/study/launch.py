"""Processes of a study: so many at a time, until all are done or the time is up."""

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from cluster import env
from gptmoe.errors import GptMoeError

from .order import PAUSED, Order

log = logging.getLogger(__name__)

_POLL_S = 0.1
_ENDS_WITHIN_S = 60.0


class Handle(Protocol):
    """Something that runs."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to save and end."""
        ...

    def leave(self) -> None:
        """Wait for that, not without end."""
        ...

    def last_words(self) -> str:
        """The end of what it printed."""
        ...


class Launcher(Protocol):
    """Starts a process that carries out an order."""

    def start(self, order: Order) -> Handle: ...


class Child:
    """A process of this machine; what it prints goes to log.txt in its folder."""

    def __init__(self, order: Order) -> None:
        self._log = order.folder / "log.txt"
        path = order.write()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "train.study.work", str(path)],
                env=env.child_environment(starts_cluster=False),
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.terminate()

    def leave(self) -> None:
        """It saves after the step that it is in; one that does not is killed."""
        try:
            self._process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        with self._log.open("rb") as log:
            return _last_line(log)


class Children:
    """Plain processes of this machine."""

    def start(self, order: Order) -> Handle:
        return Child(order)


@dataclass(frozen=True, slots=True)
class Failure:
    """An order that could not be carried out."""

    order: Order
    reason: str


@dataclass(slots=True)
class Outcome:
    """How a set of orders ended."""

    paused: bool
    failures: list[Failure]


def carry_out(
    orders: Sequence[Order],
    launcher: Launcher,
    parallel: int,
    until_s: float = 0.0,
    watch: Callable[[Sequence[Order]], None] = lambda running: None,
) -> Outcome:
    """Run the orders, `parallel` at a time, in their order; `watch` sees what runs, often.

    None is started after `until_s` (seconds since 1970; 0 = never ends). One that fails does not
    hold up the others. Whatever ends this, no process is left behind.
    """
    waiting, outcome = list(orders), Outcome(False, [])
    running: list[tuple[Order, Handle]] = []
    try:
        while waiting or running:
            late = 0 < until_s <= time.time()
            while waiting and len(running) < parallel and not late:
                order = waiting.pop(0)
                log.info("%s starts, %d wait", order.folder.name, len(waiting))
                running.append((order, launcher.start(order)))
            if late and waiting:
                outcome.paused, waiting = True, []
            watch([order for order, _ in running])
            for pair in list(running):
                _settle(pair, running, outcome)
            time.sleep(_POLL_S if running else 0.0)
    finally:
        for order, handle in running:
            _try(order, handle.stop)
        for order, handle in running:
            _try(order, handle.leave)
    return outcome


def _try(order: Order, end: Callable[[], None]) -> None:
    """One that cannot be ended keeps none of the others running."""
    try:
        end()
    except GptMoeError as error:
        log.warning("%s may still run: %s", order.folder.name, error)


def _settle(
    pair: tuple[Order, Handle], running: list[tuple[Order, Handle]], outcome: Outcome
) -> None:
    order, handle = pair
    code = handle.poll()
    if code is None:
        return
    running.remove(pair)
    if code == PAUSED:
        log.info("%s has paused", order.folder.name)
        outcome.paused = True
    elif code:
        reason = handle.last_words().removeprefix("failed: ") or f"exit code {code}"
        log.warning("%s failed: %s", order.folder.name, reason)
        outcome.failures.append(Failure(order, reason))
    else:
        log.info("%s is done", order.folder.name)


def _last_line(file: IO[bytes]) -> str:
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def last_step(metrics: Path) -> int:
    """The newest step in a metrics.jsonl, from its end alone; 0 if there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2**16))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        head = line.partition('"step": ')[2].partition(",")[0]
        if head.isdigit() and line.endswith("}"):
            return int(head)
    return 0
