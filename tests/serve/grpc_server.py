"""The gRPC methods behind a real server, registered as Ray Serve's proxy does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from serve.control import ControlServicer
from serve.operations import Operations
from serve.proxy import add_services
from serve.rpc import Servicer
from serve.service import Service


class Both(Servicer, ControlServicer):
    """What a replica inherits."""


@asynccontextmanager
async def serving(service: Service, operations: Operations | None = None) -> AsyncIterator[str]:
    """Where `service` answers, on this event loop; operated only with `operations`."""
    servicer = Both()
    servicer.service = service
    if operations:
        servicer.operations = operations
    server = grpc.aio.server()
    add_services(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
