"""The access log around a deployment: its gRPC methods, and what its engine does for any call."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, Protocol, TypeVar

from .access_log import AccessLog, current
from .methods import METHODS, Method
from .refusals import ticket_of
from .service import Call, Running, Service

T = TypeVar("T")


class LoggedService(Service):
    """A Service that tells the access log what the engine is asked for a call, and what it says."""

    @asynccontextmanager
    async def opened(self, call: Call) -> AsyncIterator[Running]:
        """See Service.opened."""
        entry = current()
        place = entry.ask(call.request_id, call.prompt)
        try:
            async with super().opened(call) as running:
                yield replace(running, deltas=entry.noted(place, running.deltas))
        except (asyncio.CancelledError, GeneratorExit):
            entry.leave()
            raise
        except Exception as error:  # a stream over HTTP says it in its last event
            entry.fail(error)
            raise


class Logging(Protocol):
    """A deployment with an access log."""

    access_log: AccessLog


def logged(kind: type[T]) -> type[T]:
    """Have each call of a deployment's gRPC methods written down, whatever it comes to."""
    for method in METHODS:
        setattr(kind, method.name, _logged(method, getattr(kind, method.name)))
    return kind


def _logged(method: Method, answer: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(answer)
    async def unary(self: Logging, request: bytes, grpc_context: Any) -> Any:
        with self.access_log.call(method.name, "grpc") as entry, entry.active():
            try:
                return await answer(self, request, grpc_context)
            finally:
                entry.name(ticket_of(grpc_context).holder)  # as the edge calls it to its caller

    @wraps(answer)
    async def streaming(self: Logging, request: bytes, grpc_context: Any) -> AsyncIterator[Any]:
        with self.access_log.call(method.name, "grpc") as entry:
            async with (
                aclosing(answer(self, request, grpc_context)) as messages,
                aclosing(entry.within(messages)) as noted,
            ):
                try:
                    async for message in noted:
                        yield message
                finally:
                    entry.name(ticket_of(grpc_context).holder)

    return streaming if method.streaming else unary
