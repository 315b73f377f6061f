"""Calls to an edge in front of replicas that are none, through real gRPC channels."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services
from serve.config import EdgeConfig
from serve.edge.backend import Replicas
from serve.edge.server import EdgeServer
from serve.keys import Keys
from tests.fake_replicas import Handle

Stub = Any


@asynccontextmanager
async def edge(
    handle: Handle, keys: Keys | None = None, *, sleeps: bool = False, **config: Any
) -> AsyncIterator[str]:
    """A running edge's address."""
    server = EdgeServer(Replicas(handle), EdgeConfig(port=0, **config), keys, sleeps=sleeps)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def ask(handle: Handle, use: Callable[[Stub], Awaitable[Any]], **config: Any) -> Any:
    """What `use` gets of an edge in front of `handle`."""

    async def run() -> Any:
        async with edge(handle, **config) as target, grpc.aio.insecure_channel(target) as channel:
            return await asyncio.wait_for(use(services.GenerationStub(channel)), 20)

    return asyncio.run(run())


def request(**fields: Any) -> messages.GenerateRequest:
    return messages.GenerateRequest(prompt="静夜", **fields)


async def streamed(stub: Stub, **fields: Any) -> list[messages.GenerateChunk]:
    return [chunk async for chunk in stub.GenerateStream(request(**fields))]


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def details(call: Any) -> list[Any]:
    """The rich details that a call ends with."""
    status = await rpc_status.aio.from_call(call)
    found = []
    for packed in status.details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
        found.append(kind.FromString(packed.value))
    return found


async def drain(call: Any) -> list[Any]:
    """All that a stream brings."""
    return [chunk async for chunk in call]


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what another task does."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)
