"""Keys on Ray Serve's own gRPC port: its proxy knows none, so the methods ask for them."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import wraps
from typing import Any, Protocol, TypeVar

from gptmoe.errors import GptMoeError

from .keys import Keys
from .methods import METHODS, Method
from .refusals import Direct, set_status

T = TypeVar("T")


class Keyed(Protocol):
    """A deployment that may ask for keys."""

    keys: Keys | None


def guarded(kind: type[T]) -> type[T]:
    """Have each gRPC method of a deployment's class ask for a key before anything else.

    Not of who calls it without gRPC (refusals.Direct): the edge has checked the key before.
    """
    for method in METHODS:
        setattr(kind, method.name, _guarded(method, getattr(kind, method.name)))
    return kind


def authorization(metadata: Any) -> str | None:
    """The value of the header `authorization` in a call's metadata."""
    return next((str(value) for key, value in metadata or () if key == "authorization"), None)


def _guarded(method: Method, unguarded: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(unguarded)
    async def unary(self: Keyed, request: bytes, grpc_context: Any) -> Any:
        try:
            _check(self, method, grpc_context)
        except GptMoeError as error:
            set_status(error, grpc_context)
            return method.answer()
        return await unguarded(self, request, grpc_context)

    @wraps(unguarded)
    async def streaming(self: Keyed, request: bytes, grpc_context: Any) -> AsyncIterator[Any]:
        try:
            _check(self, method, grpc_context)
        except GptMoeError as error:
            set_status(error, grpc_context)
            raise
        async with aclosing(unguarded(self, request, grpc_context)) as messages:
            async for message in messages:
                yield message

    return streaming if method.streaming else unary


def _check(deployment: Keyed, method: Method, grpc_context: Any) -> None:
    """Raises Unauthenticated or PermissionDenied."""
    if deployment.keys is not None and not isinstance(grpc_context, Direct):
        shown = authorization(grpc_context.invocation_metadata())
        deployment.keys.check(shown, operation=method.name if method.operates else "")
