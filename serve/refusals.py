"""Errors as gRPC says them: one table for all methods.

The methods raise the typed errors of gptmoe.errors; what carries their answers makes statuses of
them: `set_status` for Ray Serve's proxy, edge/statuses.py for the edge.
"""

from typing import Protocol

import grpc

from cluster.answers import RETRY_AFTER
from gptmoe.errors import (
    AlreadyRunning,
    ClusterError,
    DeadlineExceeded,
    GptMoeError,
    NotFound,
    Overloaded,
    PermissionDenied,
    RequestError,
    Unauthenticated,
    Unavailable,
)

from .access_log import current
from .names import ALONE, Ticket

Metadata = list[tuple[str, str]]

MOST_CHARACTERS = 500
"""Of a sentence: in 16 KB of metadata it comes three times, and written with three bytes a byte."""


class NotWithThis(GptMoeError):
    """The request is right, and does not go with this application."""


class Overtaken(GptMoeError):
    """Another operator came between."""


_CODES = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotWithThis, grpc.StatusCode.FAILED_PRECONDITION),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (AlreadyRunning, grpc.StatusCode.ALREADY_EXISTS),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Overtaken, grpc.StatusCode.ABORTED),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ClusterError, grpc.StatusCode.UNAVAILABLE),
    (GptMoeError, grpc.StatusCode.INTERNAL),
)


class Context(Protocol):
    """What the methods need of Ray Serve's grpc_context."""

    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None: ...


class Direct:
    """The context of a method that is called without gRPC: it keeps the error itself.

    `ticket` is that of the caller's call, for a request that may go on at another replica.
    """

    def __init__(self, ticket: Ticket = ALONE) -> None:
        self.ticket = ticket
        self.error: GptMoeError | None = None

    def set_code(self, code: grpc.StatusCode) -> None:
        """Not wanted: the error says more."""

    def set_details(self, details: str) -> None:
        """Not wanted either."""

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """Nor this."""


def code_of(error: GptMoeError) -> grpc.StatusCode:
    """The code that says what kind of error it is."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def ticket_of(context: Context) -> Ticket:
    """Of a call that came through the edge; ALONE for all others."""
    return context.ticket if isinstance(context, Direct) else ALONE


def sentence(error: GptMoeError) -> str:
    """What is said of an error. It may name what the caller sent, and a status has little room."""
    text = str(error)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def set_status(error: GptMoeError, context: Context) -> None:
    """The code and sentence of an error, and when to come again; its kind goes into the access log.

    With Ray Serve 2.60 the last reaches only callers of unary methods: of a stream that is refused
    its proxy learns the code and the sentence.
    """
    current().fail(error)
    if isinstance(context, Direct):
        context.error = error
    context.set_code(code_of(error))
    context.set_details(sentence(error))
    if found := retry_metadata(error):
        context.set_trailing_metadata(found)


def retry_metadata(error: GptMoeError) -> Metadata:
    """The trailing metadata of an error that passes here; empty for others."""
    after_s = retry_after_s(error)
    return [] if after_s is None else [(RETRY_AFTER, str(round(1000 * after_s)))]


def retry_after_s(error: GptMoeError) -> float | None:
    """When to ask again here; None: nobody knows, or nothing changes by waiting."""
    return error.retry_after_s if isinstance(error, Overloaded | Unavailable) else None
