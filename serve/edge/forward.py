"""From a gRPC call to the replicas and back: deadlines, other replicas, statuses.

Bytes pass through. A method's handler writes to its caller as it goes, so that one timeout covers
waiting and writing, and whatever ends it reaches the replica as a cancel.
"""

import asyncio
import itertools
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any

import grpc

from gptmoe.errors import DeadlineExceeded, GptMoeError
from serve.access_log import AccessLog, Entry, LogConfig
from serve.config import EdgeConfig
from serve.methods import GENERATION, Method
from serve.names import ALONE, Ticket

from . import statuses, wire
from .backend import Backend
from .patience import NoReplica, Patience, ReplicaLost
from .story import Story

log = logging.getLogger(__name__)

REPLICA_SAYS_S = 0.25
"""Behind a deadline, for the replica's word on it to arrive."""


class Forward:
    """The methods of all services, each of them handed on to the replicas."""

    def __init__(
        self, backend: Backend, config: EdgeConfig, access_log: AccessLog | None = None
    ) -> None:
        """`access_log` gets the calls that no replica can write down."""
        self._backend = backend
        self._access_log = access_log or AccessLog(LogConfig(access=False), "")
        self._tries, self._resume_s = config.tries, config.resume_s
        self._under_way, self._closing = 0, False
        self._none = asyncio.Event()
        self._none.set()

    def handler(self, method: Method) -> grpc.RpcMethodHandler:
        """What grpc.aio calls for a method: bytes in, bytes out."""
        if method.streaming:
            return grpc.unary_stream_rpc_method_handler(partial(self._call, self.stream, method))
        return grpc.unary_unary_rpc_method_handler(partial(self._call, self.unary, method))

    async def drain(self, within_s: float) -> None:
        """Refuse new calls; comes back when those under way have ended, or in time."""
        self._closing = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._none.wait(), within_s)

    async def _call(
        self, answer: Callable[..., Awaitable[Any]], method: Method, request: bytes, context: Any
    ) -> Any:
        if method.streaming and method.service != GENERATION:  # WatchTopology: it never ends
            return await answer(method, request, context)
        if self._closing:
            refusal = NoReplica("this edge is stopping and takes no new calls; send it again", 1.0)
            self._note(self._access_log.entry(method.name, "grpc"), refusal)
            await context.abort_with_status(statuses.status_of(refusal))
        self._under_way += 1
        self._none.clear()
        try:
            return await answer(method, request, context)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._none.set()

    async def unary(self, method: Method, request: bytes, context: Any) -> bytes:
        """One answer; sent again as it is where a replica dies: the same request, the same text."""
        asked = _asked(method, request, context)
        async with self._answering(context, method, asked):
            patience = self._patience(method)
            for turn in itertools.count():
                try:
                    ticket = Ticket(asked.holder, turn)
                    return await self._backend.unary(method.name, asked.data, ticket)
                except GptMoeError as error:
                    wait_s = patience.wait_s(error)
                    log.warning("a request is asked again id=%s reason=%s", asked.request_id, error)
                await asyncio.sleep(wait_s)
        raise AssertionError("aborted before")

    async def stream(self, method: Method, request: bytes, context: Any) -> None:
        """A stream of answers; a text goes on where a replica dies."""
        asked = _asked(method, request, context)
        async with self._answering(context, method, asked):
            if method.service != GENERATION:
                async with aclosing(self._chunks(method, asked.data, ALONE)) as chunks:
                    async for chunk in chunks:
                        await context.write(chunk)
            else:
                await self._tell(method, asked, context.write)

    @asynccontextmanager
    async def _answering(
        self, context: Any, method: Method, asked: wire.Asked
    ) -> AsyncIterator[None]:
        """Ends the call with a status for what goes wrong, at its deadline at the latest."""
        entry = self._access_log.entry(method.name, "grpc", asked.request_id)
        try:
            try:
                async with asyncio.timeout(_later(asked.deadline_s)):
                    yield
            except TimeoutError:
                raise DeadlineExceeded(
                    "the deadline has passed before the answer was complete"
                ) from None
        except GptMoeError as error:
            if isinstance(error, NoReplica):
                self._note(entry, error)
            await context.abort_with_status(statuses.status_of(error, asked.request_id))
        except Exception as error:
            log.exception("a request failed id=%s", asked.request_id)
            self._note(entry, error)
            await context.abort_with_status(statuses.broken(asked.request_id))

    def _note(self, entry: Entry, error: Exception) -> None:
        """A line in the access log about what no replica has a line for."""
        entry.fail(error)
        self._access_log.write(entry)

    def _chunks(self, method: Method, data: bytes, ticket: Ticket) -> Any:
        return self._backend.stream(method.name, data, ticket)

    def _patience(self, method: Method) -> Patience:
        """What operators ask is not asked twice: it may have been done."""
        return Patience(self._tries if method.service == GENERATION else 1, self._resume_s)

    async def _tell(
        self, method: Method, asked: wire.Asked, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Raises what ends the story before its finish."""
        story, patience, data = Story(), self._patience(method), asked.data
        for turn in itertools.count():
            try:
                source = self._chunks(method, data, Ticket(asked.holder, turn))
                async with _taken_over(source, patience) as chunks:
                    async for chunk in chunks:
                        told = story.tell(chunk)
                        if told is not None:
                            await write(told)
                return
            except GptMoeError as error:
                if story.finished and asked.resumable:
                    return
                begun = story.begun
                can_go_on = asked.resumable or not begun
                wait_s = patience.wait_s(error, begun=begun, can_go_on=can_go_on)
                log.warning("a stream goes on elsewhere id=%s reason=%s", asked.request_id, error)
            await asyncio.sleep(wait_s)
            if story.begun:
                data = wire.resuming(asked.data, story.resume())


def _later(deadline_s: float | None) -> float | None:
    """A replica keeps a deadline itself, and says how many tokens it came to."""
    return None if deadline_s is None else deadline_s + REPLICA_SAYS_S


def _asked(method: Method, request: bytes, context: Any) -> wire.Asked:
    return wire.read(method.name, request, context.time_remaining(), uuid.uuid4().hex)


@asynccontextmanager
async def _taken_over(chunks: Any, patience: Patience) -> AsyncIterator[AsyncIterator[bytes]]:
    """The chunks, closed at the end. Raises ReplicaLost if the first one takes too long."""

    async def patient() -> AsyncIterator[bytes]:
        async for chunk in chunks:
            limit.reschedule(None)
            patience.moved()
            yield chunk

    try:
        async with asyncio.timeout(patience.left_s) as limit, aclosing(chunks):
            yield patient()
    except TimeoutError:
        if not limit.expired():
            raise
        raise ReplicaLost("no other replica took it over in time") from None
