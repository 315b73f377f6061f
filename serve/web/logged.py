"""The access log around the HTTP application: a line for each request but those of probes."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.access_log import AccessLog

from .refusals import path_of

PROBES = frozenset({"/healthz", "/readyz"})
"""Asked every few seconds, by nobody who wants to read of it."""


class Logged:
    """An ASGI middleware, outside of all that may refuse a request."""

    def __init__(self, app: ASGIApp, log: AccessLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in PROBES:
            await self._app(scope, receive, send)
            return
        method = f"{scope['method']} {path_of(scope)}"
        name = Headers(scope=scope).get("x-request-id", "")
        with self._log.call(method, "http", name) as entry, entry.active():
            await self._app(scope, receive, send)
