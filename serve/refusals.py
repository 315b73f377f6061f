"""Errors as gRPC says them: one table for all methods.

The methods raise the typed errors of gptmoe.errors; what carries their answers makes statuses of
them: `set_status` for Ray Serve's proxy, edge/statuses.py for the edge.
"""

from typing import Protocol

import grpc

from gptmoe.errors import (
    AlreadyRunning,
    ClusterError,
    DeadlineExceeded,
    GptMoeError,
    NotFound,
    Overloaded,
    RequestError,
    Unauthenticated,
)

from .names import ALONE, Ticket


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


def code_of(error: GptMoeError) -> grpc.StatusCode:
    """The code that says what kind of error it is."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def ticket_of(context: Context) -> Ticket:
    """Of a call that came through the edge; ALONE for all others."""
    return context.ticket if isinstance(context, Direct) else ALONE


def set_status(error: GptMoeError, context: Context) -> None:
    """The code and sentence of an error."""
    if isinstance(context, Direct):
        context.error = error
    context.set_code(code_of(error))
    context.set_details(str(error))
