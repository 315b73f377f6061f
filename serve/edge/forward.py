"""From a gRPC call to the replicas and back: deadlines, other replicas, statuses.

Bytes pass through. A method's handler writes to its caller as it goes, so that one timeout covers
waiting and writing, and whatever ends it reaches the replica as a cancel.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import grpc

from gptmoe.errors import (
    AlreadyRunning,
    ClusterError,
    DeadlineExceeded,
    GptMoeError,
    Unavailable,
)
from serve.config import EdgeConfig
from serve.methods import GENERATION, Method

from . import statuses, wire
from .backend import Backend, ReplicaLost
from .story import Story

log = logging.getLogger(__name__)

_AGAIN_AFTER_S = 0.5


class Forward:
    """The methods of all services, each of them handed on to the replicas."""

    def __init__(self, backend: Backend, config: EdgeConfig) -> None:
        self._backend = backend
        self._tries, self._resume_s = config.tries, config.resume_s

    def handler(self, method: Method) -> grpc.RpcMethodHandler:
        """What grpc.aio calls for a method: bytes in, bytes out."""
        if method.streaming:
            return grpc.unary_stream_rpc_method_handler(partial(self.stream, method))
        return grpc.unary_unary_rpc_method_handler(partial(self.unary, method))

    async def unary(self, method: Method, request: bytes, context: Any) -> bytes:
        """One answer; sent again as it is where a replica dies: the same request, the same text."""
        asked = wire.read(method.name, request, context.time_remaining())
        async with _answering(context, asked):
            call = partial(self._backend.unary, method.name, asked.data)
            tries = self._tries if method.service == GENERATION else 1
            return await self._until_answered(call, tries)
        raise AssertionError("aborted before")

    async def stream(self, method: Method, request: bytes, context: Any) -> None:
        """A stream of answers; a text goes on where a replica dies."""
        asked = wire.read(method.name, request, context.time_remaining())
        async with _answering(context, asked):
            if method.service != GENERATION:
                async with aclosing(self._chunks(method, asked.data)) as chunks:
                    async for chunk in chunks:
                        await context.write(chunk)
            else:
                await self._tell(method, asked, context.write)

    def _chunks(self, method: Method, data: bytes) -> Any:
        return self._backend.stream(method.name, data)

    async def _until_answered(self, call: Callable[[], Awaitable[bytes]], tries: int) -> bytes:
        for left in range(tries - 1, -1, -1):
            try:
                return await call()
            except GptMoeError as error:
                if not left or not _is_lost(error):
                    raise
                log.warning("a request is asked again reason=%s", error)
        raise AssertionError("tries is at least 1")

    async def _tell(
        self, method: Method, asked: wire.Asked, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Raises what ends the story before its finish."""
        story = Story()
        data, patience_s = asked.data, None
        for left in range(self._tries - 1, -1, -1):
            try:
                async with _first_within(self._chunks(method, data), patience_s) as chunks:
                    async for chunk in chunks:
                        told = story.tell(chunk)
                        if told is not None:
                            await write(told)
                return
            except GptMoeError as error:
                if story.finished:
                    return
                resumed = patience_s is not None
                if not (_is_lost(error) or _may_pass(error, story.begun, resumed)):
                    raise
                if not left or (story.begun and not asked.resumable):
                    raise _given_up(error) from error
                log.warning("a stream goes on elsewhere id=%s reason=%s", asked.request_id, error)
                await asyncio.sleep(_wait_s(error))
            if story.begun:
                data = wire.resuming(asked.data, story.resume())
            patience_s = self._resume_s


@asynccontextmanager
async def _first_within(chunks: Any, patience_s: float | None) -> AsyncIterator[Any]:
    """The chunks, closed at the end. Raises ReplicaLost if the first one takes too long."""

    async def patient() -> AsyncIterator[bytes]:
        async for chunk in chunks:
            limit.reschedule(None)
            yield chunk

    try:
        async with asyncio.timeout(patience_s) as limit, aclosing(chunks):
            yield patient()
    except TimeoutError:
        if not limit.expired():
            raise
        raise ReplicaLost(f"no other replica took the request over in {patience_s} s") from None


@asynccontextmanager
async def _answering(context: Any, asked: wire.Asked) -> AsyncIterator[None]:
    """Ends the call with a status for what goes wrong, at its deadline at the latest."""
    try:
        try:
            async with asyncio.timeout(asked.deadline_s):
                yield
        except TimeoutError:
            raise DeadlineExceeded(
                "the deadline has passed before the answer was complete"
            ) from None
    except GptMoeError as error:
        status = statuses.status_of(error, asked.request_id)
        await context.abort_with_status(status)
    except Exception:
        log.exception("a request failed id=%s", asked.request_id)
        await context.abort_with_status(statuses.broken())


def _is_lost(error: GptMoeError) -> bool:
    """The replica cannot answer any more, whatever it is asked: another one can."""
    if isinstance(error, ReplicaLost):
        return True
    return isinstance(error, ClusterError) and not isinstance(error, Unavailable)


def _may_pass(error: GptMoeError, begun: bool, resumed: bool) -> bool:
    """A replica that is away for a while in mid-stream, or one that still thinks it has the id."""
    if isinstance(error, AlreadyRunning):
        return resumed
    return isinstance(error, Unavailable) and begun


def _wait_s(error: GptMoeError) -> float:
    if isinstance(error, ReplicaLost):
        return 0.0
    return error.retry_after_s if isinstance(error, Unavailable) else _AGAIN_AFTER_S


def _given_up(error: GptMoeError) -> Unavailable:
    return Unavailable(
        f"the replica that wrote this text is gone ({error}); send the request again"
    )
