"""The registry as a Ray actor, and a replica's side of it.

One actor an application, found by its name; the first replica that looks for it makes it. It is
detached, so that it outlives any replica, and leaves by itself when no replica has been heard of
for SILENT_S: however an application ends, nothing of it stays. It keeps nothing on disk: replicas
tell a new one what they run.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray
import ray.actor
import ray.exceptions

from cluster.coordinator_actor import NAMESPACE
from gptmoe.errors import AlreadyRunning, NotFound, Unavailable

from .names import ALONE, Ticket
from .registry import SILENT_S, Registry

log = logging.getLogger(__name__)

PREFIX = "gptmoe-requests:"
POLL_S = 5.0
"""How long the registry keeps a replica waiting for something to abort; well under SILENT_S."""
ANSWER_WITHIN_S = 2.0
"""The longest that a request waits for its claim: then it runs without."""
CONNECT_AGAIN_S = 1.0
ABORT_AGAIN_S, ABORT_TRIES = 0.02, 25
TELL_EVERY_S = 0.2
"""A replica tells of fresh ids so often at most: what began and ended in between costs nothing."""
FOUND_WITHIN_S = 2 * TELL_EVERY_S
"""An abort waits so long for an id of which the registry may hear still."""


class RegistryActor:
    """Registry for replicas that wait for what they have to abort."""

    def __init__(self) -> None:
        self._registry = Registry(time.monotonic)
        self._news: dict[str, asyncio.Event] = {}
        self._watch: asyncio.Task[None] | None = None

    async def greet(self, replica: str, running: Mapping[str, Ticket]) -> None:
        """See Registry.greet."""
        self._registry.greet(replica, running)
        self._watch = self._watch or asyncio.create_task(self._leave_when_alone())

    async def claim(self, request_id: str, replica: str, ticket: Ticket) -> bool:
        """See Registry.claim."""
        claimed = self._registry.claim(request_id, replica, ticket)
        self._wake(replica)
        return claimed

    async def note(
        self, replica: str, began: Mapping[str, Ticket], ended: Mapping[str, Ticket]
    ) -> None:
        """Requests that a replica runs since, and runs no longer."""
        for request_id, ticket in began.items():
            self._registry.claim(request_id, replica, ticket)
        for request_id, ticket in ended.items():
            self._registry.release(request_id, replica, ticket)
        self._wake(replica)

    async def abort(self, request_id: str) -> bool:
        """Have the replica that runs a request abort it; False if none does."""
        gives_up_s = time.monotonic() + FOUND_WITHIN_S
        while (owner := self._registry.abort(request_id)) is None:
            if time.monotonic() > gives_up_s:
                return False
            await asyncio.sleep(ABORT_AGAIN_S)
        self._wake(owner)
        return True

    async def next_aborts(self, replica: str, within_s: float = POLL_S) -> tuple[str, ...] | None:
        """What a replica has to abort, as soon as there is something; empty after `within_s`.

        None: the registry does not know the replica, which has to greet.
        """
        if not self._registry.knows(replica):
            return None
        event = self._event(replica)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await event.wait()
        event.clear()
        return self._registry.take_aborts(replica) if self._registry.knows(replica) else None

    def _wake(self, replica: str) -> None:
        if self._registry.has_aborts(replica):
            self._event(replica).set()

    def _event(self, replica: str) -> asyncio.Event:
        return self._news.setdefault(replica, asyncio.Event())

    async def _leave_when_alone(self) -> None:
        while not self._registry.alone:
            await asyncio.sleep(SILENT_S / 3)
        with contextlib.suppress(ray.exceptions.AsyncioActorExit):  # nobody waits for this task
            ray.actor.exit_actor()


def connected(application: str) -> Any:
    """A handle of the application's registry, made if it is not there. Blocks; raises RayError."""
    options = {
        "name": PREFIX + application,
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "num_cpus": 0,
    }
    return ray.remote(RegistryActor).options(**options).remote()


class Claims:
    """A replica's side of the registry: `service.Names`. All on one event loop.

    While the registry is away requests run without a claim, which the log says once.
    """

    def __init__(
        self,
        replica: str,
        connect: Callable[[], Any],
        abort: Callable[[str], Awaitable[bool]],
    ) -> None:
        """`connect` blocks until it has a handle; `abort` ends a request that runs here."""
        self._replica, self._connect, self._abort_here = replica, connect, abort
        self._running: dict[str, Ticket] = {}
        self._began: dict[str, Ticket] = {}
        self._ended: dict[str, Ticket] = {}
        self._news = asyncio.Event()
        self._known = asyncio.Event()
        self._actor: Any = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Find the registry and stay connected; once, on the event loop of the requests."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._tell())]

    async def stop(self) -> None:
        """Let the registry go; its claims end when it misses this replica."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._actor = None

    async def claim(self, request_id: str, ticket: Ticket = ALONE) -> None:
        """Take an id that the caller chose; raises AlreadyRunning if it runs on any replica.

        Unless it is the same request that ran there: it is this replica's from now, and one that
        still runs here for nobody is ended.
        """
        held = self._running.get(request_id)
        free = held is None or ticket.follows(held)
        if free and held is not None:
            await self._abort_here(request_id)
        if not free or not await self._claimed(request_id, ticket):
            raise AlreadyRunning(
                f"request_id {request_id!r} is running; wait for it, or use another id"
            )
        self._running[request_id] = ticket

    async def _claimed(self, request_id: str, ticket: Ticket) -> bool:
        if self._actor is None:
            return True
        try:
            answer = self._actor.claim.remote(request_id, self._replica, ticket)
            return bool(await _within(answer))
        except asyncio.CancelledError:  # the caller left, and the claim may come to be
            self._end(request_id, ticket)
            raise
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("no claim request_id=%s error=%s", request_id, _first_line(error))
            return True

    def note(self, request_id: str, ticket: Ticket = ALONE) -> None:
        """Say in the background that a request of a fresh id runs here."""
        self._running[request_id] = self._began[request_id] = ticket
        self._news.set()

    async def release(self, request_id: str, ticket: Ticket = ALONE) -> None:
        """Free an id, and return when any replica can take it."""
        self._free(request_id, ticket)
        if self._actor is not None:
            try:
                await _within(self._actor.note.remote(self._replica, {}, {request_id: ticket}))
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.warning("no release request_id=%s error=%s", request_id, _first_line(error))

    def let_go(self, request_id: str, ticket: Ticket = ALONE) -> None:
        """The same in the background; no effect on an id that is free, or taken again."""
        if self._free(request_id, ticket):
            self._end(request_id, ticket)

    def _free(self, request_id: str, ticket: Ticket) -> bool:
        """Whether it ran here with this ticket until now."""
        ran = self._running.get(request_id) == ticket
        if ran:
            del self._running[request_id]
        return ran

    async def abort(self, request_id: str) -> None:
        """Have the replica that runs a request end it.

        Raises NotFound if none does, Unavailable while the registry is away.
        """
        if self._actor is None:  # a replica that has just started looks for it still
            with contextlib.suppress(TimeoutError):
                await _within(self._known.wait())
        if self._actor is None:
            raise Unavailable("nobody knows for now which replica runs what; abort again later")
        try:
            known = await _within(self._actor.abort.remote(request_id))
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise Unavailable(f"the registry of requests is away: {_first_line(error)}") from None
        if not known:
            raise NotFound(f"no request {request_id!r} is running; it may have ended")

    def _end(self, request_id: str, ticket: Ticket) -> None:
        self._ended[request_id] = ticket
        self._news.set()

    async def _follow(self) -> None:
        """Wait for what has to be aborted here; connect anew whenever the registry was lost."""
        while True:
            try:
                actor = await asyncio.to_thread(self._connect)
                while True:
                    await self._greet(actor)
                    while (aborts := await self._aborts_of(actor)) is not None:
                        await asyncio.gather(*map(self._aborted, aborts))
            except (ray.exceptions.RayError, TimeoutError, ValueError) as error:
                log.warning("the registry of requests is away error=%s", _first_line(error))
                self._actor = None
                self._known.clear()
            await asyncio.sleep(CONNECT_AGAIN_S)

    async def _aborted(self, request_id: str) -> None:
        """One that goes on here may have been aborted before the engine has it."""
        for _ in range(ABORT_TRIES):
            if await self._abort_here(request_id) or request_id not in self._running:
                return
            await asyncio.sleep(ABORT_AGAIN_S)

    async def _greet(self, actor: Any) -> None:
        told = dict(self._running)
        await _within(actor.greet.remote(self._replica, told), SILENT_S)
        self._actor = actor
        self._known.set()
        self._began = {key: it for key, it in self._began.items() if told.get(key) != it}
        for request_id in told.keys() - self._running.keys():  # ended meanwhile
            self._end(request_id, told[request_id])

    async def _aborts_of(self, actor: Any) -> tuple[str, ...] | None:
        answer = actor.next_aborts.remote(self._replica, POLL_S)
        return await _within(answer, POLL_S + SILENT_S)

    async def _tell(self) -> None:
        """Send what began and ended, all that came together in one call."""
        while True:
            await self._news.wait()
            await asyncio.sleep(TELL_EVERY_S)
            self._news.clear()
            began, ended = _apart(self._began, self._ended)
            self._began, self._ended = {}, {}
            if self._actor is None or not (began or ended):
                continue  # a new registry is told what runs then
            try:
                await _within(self._actor.note.remote(self._replica, began, ended))
            except (ray.exceptions.RayError, TimeoutError):
                self._began, self._ended = began | self._began, ended | self._ended
                self._news.set()
                await asyncio.sleep(CONNECT_AGAIN_S)


def _apart(
    began: Mapping[str, Ticket], ended: Mapping[str, Ticket]
) -> tuple[dict[str, Ticket], dict[str, Ticket]]:
    """What began and runs still, and what ended that began before."""
    both = began.items() & ended.items()
    return dict(began.items() - both), dict(ended.items() - both)


async def _within(answer: Awaitable[Any], within_s: float = ANSWER_WITHIN_S) -> Any:
    async with asyncio.timeout(within_s):
        return await answer


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
