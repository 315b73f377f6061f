"""The engine's thread: an Engine computes there, asyncio callers wait here.

    bridge = EngineThread(engine)
    async for delta in bridge.stream(request):
        ...

An engine has one owner, and a step takes milliseconds that an event loop must not lose: so a thread
of its own runs the steps. Callers put commands into its inbox, which it obeys between two steps; it
puts each request's deltas into that request's outbox, on the caller's event loop.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from gptmoe.errors import ClusterError, GptMoeError, Unavailable
from gptmoe.generate.delta import Delta
from gptmoe.generate.request import Request
from gptmoe.generate.stats import EngineStats

from .metrics import Observer
from .outbox import Outbox

log = logging.getLogger(__name__)


DELTAS_A_SECOND = 75.0
"""Of all streams together, for each core that computes for them: one that is sent takes 1 to 2 ms
of a core of its own on its way to the caller."""

WATCH_EVERY_S = 2.0
"""Its observer hears of an engine without work so often."""

SMOOTH_S = 1 / 30
"""Between two deltas of a stream however few streams there are: no eye sees more pictures."""


class Stepper(Protocol):
    """What the bridge needs of an engine."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> object: ...
    def end(self, request_id: str) -> Sequence[Delta]: ...
    def step(self) -> Sequence[Delta]: ...
    @property
    def stats(self) -> EngineStats: ...


class EngineThread:
    """Runs one engine in one thread, from construction to `stop`.

    Invariant: only that thread touches the engine and `_outboxes`, until it has failed.
    """

    def __init__(self, engine: Stepper, observer: Observer | None = None, cores: int = 2) -> None:
        """`cores` compute for the engine: the more there are, the smoother streams may be."""
        self._engine, self._observer = engine, observer
        self._cores = cores
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outboxes: dict[str, Outbox] = {}
        self._moved_s = time.monotonic()  # when something came out, or work came to an idle engine
        self._step_began_s: float | None = None  # None while there is nothing to compute
        self._failure: GptMoeError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the request's deltas; the last one of each answer has a finish_reason.

        Each holds all tokens since the one before. The more streams there are the longer one waits
        for its next tokens, so that sending does not take the time of computing; what ends an
        answer waits for nothing.

        Leaving early (a cancelled task, a closed generator) frees its place in the engine. Raises
        RequestError and Overloaded before the first delta; ClusterError if the engine stops, as
        Unavailable if it will go on; CheckpointError where the model's scores are no numbers.
        """
        unfinished = set(range(request.sampling.n))
        outbox = Outbox(asyncio.get_running_loop(), set(unfinished))
        self._inbox.put(partial(self._admit, request, outbox))
        if self._failure:  # set before the thread empties its inbox for good: no call is lost
            raise self._failure
        sent_s = -math.inf  # the first token goes out at once
        try:
            while unfinished:
                first = await outbox.items.get()
                wait_s = sent_s + self.send_every_s - time.monotonic()
                if wait_s > 0 and not isinstance(first, GptMoeError):
                    await outbox.completed(within_s=wait_s)
                for item in outbox.taken(first):
                    if isinstance(item, GptMoeError):
                        raise item
                    if item.finish_reason:
                        unfinished.discard(item.index)
                    yield item
                sent_s = time.monotonic()
        finally:
            if unfinished:
                self._inbox.put(partial(self._abandon, request.request_id, outbox))

    async def abort(self, request_id: str) -> bool:
        """End a running request: its caller gets finish_reason "abort". False if none runs."""
        ended: list[bool] = []
        call = partial(self._end, request_id, ended)
        await asyncio.wrap_future(self.between_steps(call))
        return bool(ended)

    def _end(self, request_id: str, ended: list[bool]) -> None:
        if request_id in self._outboxes:
            deltas = self._engine.end(request_id)
            for delta in deltas:
                self._deliver(delta)
            ended.append(True)
            self._watch(deltas, 0.0)

    @property
    def send_every_s(self) -> float:
        """Seconds between two deltas of a stream, at least."""
        return max(SMOOTH_S, len(self._outboxes) / (DELTAS_A_SECOND * self._cores))

    def between_steps(self, call: Callable[[], None]) -> Future[None]:
        """Have the engine's thread make a call when no step is under way."""
        done: Future[None] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return  # who asked has left; a cancelled future takes no result
            try:
                call()
                done.set_result(None)
            except GptMoeError as error:
                done.set_exception(error)
            except Exception as bug:
                done.set_exception(bug)
                raise

        self._inbox.put(run)
        if self._failure:  # the thread may have ended: nobody else comes for it
            self._empty_inbox()
        return done

    def check(self, stall_s: float) -> None:
        """Raise ClusterError if the engine has stopped, or is in one step for over `stall_s`."""
        if self._failure:
            raise self._failure
        began_s = self._step_began_s
        if began_s is not None and time.monotonic() - began_s > stall_s:
            raise ClusterError(
                f"the engine has computed one step for over {stall_s:g} s; restart the replica"
            )

    def progress(self) -> tuple[int, float]:
        """Requests under way, and the seconds since anything came out for any of them."""
        return len(self._outboxes), time.monotonic() - self._moved_s

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after the current step; requests that still run get a ClusterError."""
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._watch((), 0.0)
            while self._obey():
                self._step_began_s = time.monotonic()
                try:
                    deltas = self._engine.step()
                    took_s = time.monotonic() - self._step_began_s
                    for delta in deltas:
                        self._deliver(delta)
                    self._watch(deltas, took_s)
                except Unavailable as refusal:
                    self._send_away(refusal)
                    self._watch((), 0.0)
                self._step_began_s = None
        except Exception:
            log.exception("engine failed")
        finally:
            self._fail(ClusterError("this replica's engine has stopped; send the request again"))

    def _obey(self) -> bool:
        """Run the waiting commands; wait for one while there is nothing to compute. False: stop."""
        while True:
            try:
                command = self._inbox.get(not self._engine.has_work, WATCH_EVERY_S)
            except queue.Empty:
                if self._engine.has_work:
                    return True
                self._watch((), 0.0)
                continue
            if command is None:
                return False
            command()
            if not self._engine.has_work:
                self._watch((), 0.0)  # the last request may have been taken out

    def _watch(self, deltas: Sequence[Delta], took_s: float) -> None:
        if self._observer:
            self._observer.watch(self._engine.stats, deltas, took_s)

    def _admit(self, request: Request, outbox: Outbox) -> None:
        if self._failure:
            outbox.put(self._failure)
            return
        try:
            self._engine.add(request)
        except GptMoeError as refusal:
            outbox.put(refusal)
        else:
            self._moved_s = self._moved_s if self._outboxes else time.monotonic()
            self._outboxes[request.request_id] = outbox

    def _abandon(self, request_id: str, outbox: Outbox) -> None:
        if self._outboxes.get(request_id) is outbox:
            del self._outboxes[request_id]
            self._engine.abort(request_id)

    def _deliver(self, delta: Delta) -> None:
        self._moved_s = time.monotonic()
        outbox = self._outboxes.get(delta.request_id)
        if outbox is not None:  # None: abandoned
            if delta.finish_reason:
                outbox.unfinished.discard(delta.index)
            outbox.put(delta.error or delta)
            if not outbox.unfinished:
                del self._outboxes[delta.request_id]

    def _send_away(self, refusal: Unavailable) -> None:
        """Nothing can be computed for now: who waits is told when to come again."""
        for request_id, outbox in self._outboxes.items():
            outbox.put(refusal)
            self._engine.abort(request_id)
        self._outboxes.clear()

    def _fail(self, failure: GptMoeError) -> None:
        outboxes = list(self._outboxes.values())
        self._outboxes.clear()
        self._failure = failure  # from here on callers obey their commands themselves
        for outbox in outboxes:
            outbox.put(failure)
        self._empty_inbox()

    def _empty_inbox(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if command := self._inbox.get_nowait():
                    self._obey_late(command)

    def _obey_late(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:
            log.exception("a command to an engine that has stopped failed")
