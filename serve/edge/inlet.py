"""What the edge calls of a replica: the same methods, without Ray Serve's gRPC proxy."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from gptmoe.errors import GptMoeError
from serve.methods import METHODS
from serve.names import Ticket
from serve.refusals import Direct

Answer = bytes | GptMoeError
"""A message, or what came instead."""

Answers = tuple[bytes, ...] | GptMoeError
"""Messages of a stream that are there together, or what came instead of one."""

M = TypeVar("M")

_METHODS = {method.name: method for method in METHODS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a replica's engine comes along."""

    pending: int
    """Requests under way."""
    silent_s: float
    """Since anything came out for any of them, or since there are some."""
    draining: bool
    """New requests are refused."""


class Inlet:
    """A deployment class inherits it beside its gRPC methods, which see no gRPC here.

    Bytes in, bytes out. What a method refuses with is handed over as a value: raised, it would
    cross Ray in an envelope of text, and Ray Serve would log it with its traceback. Keys were
    checked before. The ticket says whose a request for text is; no gRPC caller can send one.
    """

    async def edge_unary(self, method: str, request: bytes, ticket: Ticket) -> Answer:
        """Call a gRPC method that answers once."""
        context = Direct(ticket)
        try:
            message = await self._method(method)(request, context)
        except GptMoeError as error:
            return error
        return context.error or bytes(message.SerializeToString())

    async def edge_stream(
        self, method: str, request: bytes, ticket: Ticket
    ) -> AsyncIterator[Answers]:
        """Call a gRPC method that answers with a stream; it ends as soon as this is cancelled."""
        try:
            async with (
                aclosing(self._method(method)(request, Direct(ticket))) as messages,
                aclosing(_in_parcels(messages)) as parcels,
            ):
                async for parcel in parcels:
                    yield tuple(message.SerializeToString() for message in parcel)
        except GptMoeError as error:
            yield error

    def _method(self, name: str) -> Any:
        return getattr(self, _METHODS[name].name)


async def _in_parcels(messages: AsyncIterator[M]) -> AsyncGenerator[tuple[M, ...], None]:
    """Messages one by one, but the second with the first if it is there at once: a stream's first
    token with its header. Each parcel wakes up three threads of two processes."""
    first = await _next(messages)
    second = asyncio.ensure_future(_next(messages))
    try:
        await asyncio.sleep(0)
        if second.done() and not second.exception():
            yield first + second.result()
        else:
            yield first
            yield await second
    finally:
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
    async for message in messages:
        yield (message,)


async def _next(messages: AsyncIterator[M]) -> tuple[M, ...]:
    """The next message, or none."""
    async for message in messages:
        return (message,)
    return ()
