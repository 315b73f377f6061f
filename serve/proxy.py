"""How Ray Serve's gRPC proxy learns the service. Light: the proxy of every node imports it."""

import grpc

from protos.generation_pb2 import DESCRIPTOR  # noqa: TID251  names and methods only, no messages


def add_generation(servicer: object, server: grpc.Server) -> None:
    """Register gptmoe.v1.Generation so that its methods receive a request as the bytes that came.

    The generated function would parse requests in the proxy, which answers one that cannot be
    parsed (invalid UTF-8, say) with INTERNAL, as if the fault were ours; `rpc` answers
    INVALID_ARGUMENT.
    """
    service = DESCRIPTOR.services_by_name["Generation"]
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
    server.add_generic_rpc_handlers((generic,))
