"""The gRPC service gptmoe.v1.ClusterControl, as Ray Serve's proxy calls it: see rpc.py.

Messages become dataclasses in cluster/wire.py; what they ask for is done in operations.py.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cluster import wire
from cluster.operations import (
    Answered,
    ControlQuery,
    DrainRequest,
    DrainResponse,
    RefreshRequest,
    RefreshResponse,
    ScaleRequest,
    ScaleResponse,
    Topologies,
)
from gptmoe.errors import GptMoeError, Overloaded

from .operations import EVERY_S, Operations
from .refusals import Context, set_status

MOST_WATCHERS = 16

Q = TypeVar("Q", ControlQuery, DrainRequest, RefreshRequest, ScaleRequest)


class ControlServicer:
    """The methods of the service; a deployment class inherits them. Names are the service's own."""

    operations: Operations
    watchers = 0

    async def GetTopology(self, request: bytes, grpc_context: Context) -> Any:
        topology, nothing = self.operations.topology, Topologies(application="")
        return await _answer(ControlQuery, request, topology, nothing, grpc_context)

    async def WatchTopology(self, request: bytes, grpc_context: Context) -> AsyncIterator[Any]:
        try:
            query = wire.parse(ControlQuery, request)
            with self._watching():
                while True:
                    yield wire.to_proto(await self.operations.topology(query))
                    await asyncio.sleep(query.every_s or EVERY_S)
        except GptMoeError as error:
            set_status(error, grpc_context)
            raise

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Each holds one of the places that Ray Serve lets requests through to a replica."""
        if self.watchers >= MOST_WATCHERS:
            raise Overloaded(
                f"{MOST_WATCHERS} callers watch this replica already; use GetTopology, or come "
                "again later",
                EVERY_S,
            )
        self.watchers += 1
        try:
            yield
        finally:
            self.watchers -= 1

    async def Drain(self, request: bytes, grpc_context: Context) -> Any:
        drain, nothing = self.operations.drain, DrainResponse()
        return await _answer(DrainRequest, request, drain, nothing, grpc_context)

    async def Refresh(self, request: bytes, grpc_context: Context) -> Any:
        refresh, nothing = self.operations.refresh, RefreshResponse(version=0, checkpoint="")
        return await _answer(RefreshRequest, request, refresh, nothing, grpc_context)

    async def Scale(self, request: bytes, grpc_context: Context) -> Any:
        scale, nothing = self.operations.scale, ScaleResponse(replicas=0)
        return await _answer(ScaleRequest, request, scale, nothing, grpc_context)


async def _answer(
    kind: type[Q],
    request: bytes,
    operation: Callable[[Q], Awaitable[Answered]],
    nothing: Answered,
    context: Context,
) -> Any:
    """The answer; with a status in the context, the empty message that Ray Serve wants then."""
    try:
        return wire.to_proto(await operation(wire.parse(kind, request)))
    except GptMoeError as error:
        set_status(error, context)
        return wire.to_proto(nothing)
