"""What the edge calls of a replica: the same methods, without Ray Serve's gRPC proxy."""

import inspect
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from serve.methods import METHODS
from serve.refusals import Direct

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

    Bytes in, bytes out; what a method refuses is raised as it is, and crosses Ray as the cause of a
    RayTaskError. Keys were checked before.
    """

    async def edge_unary(self, method: str, request: bytes) -> bytes:
        """Call a gRPC method that answers once. Raises what it raises, typed."""
        context = Direct()
        message = await self._method(method)(self, request, context)
        if context.error is not None:
            raise context.error
        return bytes(message.SerializeToString())

    async def edge_stream(self, method: str, request: bytes) -> AsyncIterator[bytes]:
        """Call a gRPC method that answers with a stream; it ends as soon as this is cancelled."""
        async with aclosing(self._method(method)(self, request, Direct())) as messages:
            async for message in messages:
                yield message.SerializeToString()

    def _method(self, name: str) -> Any:
        return inspect.unwrap(getattr(type(self), _METHODS[name].name))
