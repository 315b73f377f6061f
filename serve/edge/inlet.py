"""What the edge calls of a replica: the same methods, without Ray Serve's gRPC proxy."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gptmoe.errors import GptMoeError
from serve.methods import METHODS
from serve.names import Ticket
from serve.refusals import Direct

Answer = bytes | GptMoeError
"""A message, or what came instead."""

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
    ) -> AsyncIterator[Answer]:
        """Call a gRPC method that answers with a stream; it ends as soon as this is cancelled."""
        try:
            async with aclosing(self._method(method)(request, Direct(ticket))) as messages:
                async for message in messages:
                    yield message.SerializeToString()
        except GptMoeError as error:
            yield error

    def _method(self, name: str) -> Any:
        return getattr(self, _METHODS[name].name)
