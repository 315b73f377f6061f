"""How the tests call the gRPC methods without a server: bytes in, messages and statuses out."""

import asyncio
from typing import Any

import grpc
from google.protobuf.message import Message

from gptmoe.errors import GptMoeError
from protos import generation_pb2 as messages
from serve.rpc import Servicer


class Context:
    """Ray Serve's grpc_context, as far as the methods use it."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: list[tuple[str, str]] = []

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailing = trailing_metadata


def request(prompt: str = "春风", **fields: Any) -> bytes:
    return messages.GenerateRequest(prompt=prompt, **fields).SerializeToString()


def unary(servicer: Servicer, data: bytes) -> tuple[messages.GenerateResponse, Context]:
    context = Context()
    return asyncio.run(servicer.Generate(data, context)), context


def streamed(servicer: Servicer, data: bytes) -> tuple[list[messages.GenerateChunk], Context]:
    context = Context()

    async def collect() -> list[messages.GenerateChunk]:
        chunks = []
        try:
            async for chunk in servicer.GenerateStream(data, context):
                chunks.append(chunk)
        except GptMoeError:
            assert context.code is not None, "a status comes before an error"
        return chunks

    return asyncio.run(collect()), context


def ask(method: Any, message: Message) -> tuple[Any, Context]:
    """A unary method's answer."""
    context = Context()
    return asyncio.run(method(message.SerializeToString(), context)), context
