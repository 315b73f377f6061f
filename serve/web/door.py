"""What a request passes before its route: its key, its size, its type, its text.

Each of them is refused here, so that routes see checked JSON alone: a missing or wrong key before
the body is read, a large body as soon as it is known to be one, a body that does not come.
"""

import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from gptmoe.errors import RequestError, Unauthenticated
from gptmoe.generate.params import is_unicode
from serve.access_log import current

from .body import Bodies
from .refusals import path_of, respond

MAX_BODY_BYTES = 4 * 2**20
"""The same as the edge's for a message."""

OPEN = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})
"""What needs no key."""


class Keys(Protocol):
    """Who may ask."""

    def check(self, authorization: str | None) -> None:
        """Raise Unauthenticated unless this Authorization header holds a known key."""


class Door:
    """An ASGI middleware: callers without a key and bodies over `max_body_bytes` stay outside."""

    def __init__(self, app: ASGIApp, keys: Keys | None, max_body_bytes: int) -> None:
        self._app, self._keys = app, keys
        self._bodies = Bodies(max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = path_of(scope), Headers(scope=scope)
        try:
            if self._keys and path not in OPEN:
                self._keys.check(headers.get("authorization"))
            told = headers.get("content-length", "")
            self._bodies.check(int(told) if told.isdecimal() else 0)
            whole = await self._bodies.read(receive) if scope["method"] == "POST" else receive
        except (Unauthenticated, HTTPException) as error:
            await respond(path, error)(scope, receive, send)
            return
        if whole is None:
            current().leave()
        else:
            await self._app(scope, whole, send)


class JsonRoute(APIRoute):
    """A route whose bodies are JSON in UTF-8, and say so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            asked = _JsonRequest(request.scope, request.receive)
            if self.body_field:
                _check_type(request.headers.get("content-type", ""))
                _check_text(await asked.body())
            return await handle(asked)

        return handle_json


class _JsonRequest(Request):
    async def json(self) -> Any:
        return _parsed(await self.body())


def _parsed(body: bytes) -> Any:
    """Raises HTTPException with one sentence; JSONDecodeError, which FastAPI explains."""
    try:
        return json.loads(body.decode())
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise HTTPException(400, "the body is not a request: it is nested too deeply") from None
    except ValueError:
        raise HTTPException(400, "the body holds a number with too many digits") from None


def _check_text(body: bytes) -> None:
    """Raises RequestError for a body that is no UTF-8, with the field that is none if it can."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        name = _spoilt(body)
        found = f"found other bytes at byte {error.start} of the body"
        raise RequestError(f"{name or 'the body'} must be UTF-8 text; {found}", name) from None


def _spoilt(body: bytes) -> str:
    """Where in a JSON body the first text stands that is no UTF-8; empty: in none of its values."""
    try:
        found = [("", json.loads(body.decode(errors="surrogateescape")))]
    except (ValueError, RecursionError):
        return ""
    while found:
        name, value = found.pop()
        if isinstance(value, str) and not is_unicode(value):
            return name
        found += reversed([(f"{name}.{key}".lstrip("."), item) for key, item in _inside(value)])
    return ""


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    """What a JSON value is made of, by its place."""
    if isinstance(value, list):
        return enumerate(value)
    return value.items() if isinstance(value, dict) else ()


def _check_type(content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        found = f"found {kind}" if kind else "found none"
        raise HTTPException(
            415, f"the body must be JSON; {found}; send the header Content-Type: application/json"
        )
