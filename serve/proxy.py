"""How Ray Serve's gRPC proxy learns the services. Light: the proxy of every node imports it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from protos import control_pb2, generation_pb2  # noqa: TID251  names and methods, no messages

from .short_log import shorten

Behavior = Callable[[object, Any], AsyncIterator[object]]


def add_services(servicer: object, server: grpc.Server) -> None:
    """Register the services so that their methods receive a request as the bytes that came.

    The generated functions would parse requests in the proxy, which answers one that cannot be
    parsed (invalid UTF-8, say) with INTERNAL, as if the fault were ours; the method
    answers INVALID_ARGUMENT. Ray Serve goes by a method's name alone: no two may share one.
    """
    shorten()
    for file, name in ((generation_pb2, "Generation"), (control_pb2, "ClusterControl")):
        _add(file.DESCRIPTOR.services_by_name[name], servicer, server)


def _add(service: ServiceDescriptor, servicer: object, server: grpc.Server) -> None:
    handlers = {}
    for method in service.methods:
        handler = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = handler(
            getattr(servicer, method.name),
            response_serializer=lambda message: message.SerializeToString(),
        )
    generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
    server.add_generic_rpc_handlers((generic,))  # Ray Serve puts its own behaviors in here
    generic._method_handlers = {
        name: handler._replace(unary_stream=cancellable(handler.unary_stream))
        if handler.response_streaming
        else handler
        for name, handler in generic._method_handlers.items()
    }


def cancellable(behavior: Behavior) -> Behavior:
    """A streaming method that hears of its caller's leaving at any moment.

    Ray Serve 2.60 cancels a request only if the caller leaves while its proxy waits for the
    replica. One who leaves while a message is being sent is missed, and the replica generates for
    nobody until the end. Here a task of its own always waits for the replica and ends with the
    call.
    """

    async def stream(request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[object]:
        outbox: asyncio.Queue[object] = asyncio.Queue()  # holds one answer at most: all its tokens
        reader = asyncio.create_task(_read(behavior(request, _Outliving(context)), outbox))
        try:
            while (message := await outbox.get()) is not None:
                yield message
            await reader  # raises what the behavior raised
        finally:
            reader.cancel()

    return stream


class _Outliving:
    """A call's context that may be asked for its peer after the call.

    The proxy logs the peer of every request at its end; grpcio 1.85 crashes if the call is gone.
    """

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self._peer = context.peer()

    def peer(self) -> str:
        return self._peer

    def __getattr__(self, name: str) -> object:
        return getattr(self._context, name)


async def _read(messages: AsyncIterator[object], outbox: asyncio.Queue[object]) -> None:
    try:
        async for message in messages:
            outbox.put_nowait(message)
    finally:
        outbox.put_nowait(None)
