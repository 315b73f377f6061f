"""Errors as HTTP says them: one status each, in the shape of the API that was asked.

/v1/...    {"error": {"message", "type", "param", "code"}}   as OpenAI's
others     {"error": {"message", "field"}}
"""

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

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
)
from serve.access_log import current
from serve.refusals import retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    message: str
    field: str = ""
    """What to change."""
    code: str | None = None
    """The same for programs."""
    headers: Mapping[str, str] | None = None


_KINDS: tuple[tuple[type[GptMoeError], int, str, str], ...] = (
    (RequestError, 400, "", "invalid_value"),
    (Unauthenticated, 401, "Authorization", "invalid_api_key"),
    (PermissionDenied, 403, "Authorization", "permission_denied"),
    (NotFound, 404, "model", "model_not_found"),
    (DeadlineExceeded, 408, "deadline_ms", "deadline_exceeded"),
    (AlreadyRunning, 409, "X-Request-Id", "already_running"),
    (Overloaded, 429, "", "overloaded"),
    (ClusterError, 503, "", "unavailable"),
    (GptMoeError, 500, "", "internal"),
)
"""Status, field and code of each error; the first that fits."""

_ONCE = {"x-should-retry": "false"}
"""OpenAI's clients send a request that was refused with 408 or 409 again unless they are told so:
what was late would be computed three times for nobody."""

_HEADERS: dict[type[GptMoeError], Mapping[str, str]] = {
    Unauthenticated: {"WWW-Authenticate": "Bearer"},
    DeadlineExceeded: _ONCE,
    AlreadyRunning: _ONCE,
}

_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    415: "unsupported_media_type",
}


def refusal_of(error: Exception) -> Refusal:
    """How HTTP says this error."""
    if isinstance(error, RequestValidationError):
        return _of_malformed(error.errors())
    if isinstance(error, HTTPException):
        code = _CODES.get(error.status_code, "invalid_value")
        return Refusal(
            status=error.status_code, message=error.detail, code=code, headers=error.headers
        )
    if not isinstance(error, GptMoeError):
        message = "the server failed at this request; its log says why"
        return Refusal(status=500, message=message, code="internal")
    kind, status, name, code = next(row for row in _KINDS if isinstance(error, row[0]))
    name = error.field if isinstance(error, RequestError) else name
    headers = _HEADERS.get(kind)
    if (after_s := retry_after_s(error)) is not None:
        headers = {"Retry-After": str(max(1, math.ceil(after_s)))}
    return Refusal(status=status, message=str(error), field=name, code=code, headers=headers)


def as_openai(refusal: Refusal) -> dict[str, Any]:
    """The body of a refusal as OpenAI's."""
    kind = "invalid_request_error" if refusal.status < 429 else "server_error"
    error = {
        "message": _sendable(refusal.message),
        "type": "rate_limit_error" if refusal.status == 429 else kind,
        "param": _sendable(refusal.field) or None,
        "code": refusal.code,
    }
    return {"error": error}


def as_plain(refusal: Refusal) -> dict[str, Any]:
    """The body of a refusal for all other callers."""
    return {"error": {"message": _sendable(refusal.message), "field": _sendable(refusal.field)}}


def _sendable(text: str) -> str:
    """Without lone surrogates, which have no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def respond(path: str, error: Exception) -> Response:
    """The refusal of a request for `path`."""
    refusal = refusal_of(error)
    if isinstance(error, GptMoeError):
        current().fail(error, refusal.field)
    else:
        current().refuse(refusal.code or "", refusal.field)
    shape = as_openai if path.startswith("/v1/") else as_plain
    return JSONResponse(shape(refusal), refusal.status, refusal.headers)


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Within, a RequestError about a field is about what the caller calls it."""
    try:
        yield
    except RequestError as error:
        if error.field not in names:
            raise
        name = names[error.field]
        raise RequestError(error.message.replace(error.field, name, 1), name) from None


def install(app: FastAPI) -> None:
    """Have `app` answer errors so."""

    async def refuse(request: Request, error: Exception) -> Response:
        return respond(path_of(request.scope), error)

    async def forget(request: Request, error: Exception) -> Response:
        current().leave()
        return Response(status_code=499)  # nobody reads it

    for kind in (GptMoeError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(ClientDisconnect, forget)


def path_of(scope: Mapping[str, Any]) -> str:
    """The path that was asked, wherever the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel, _short.maxlist, _short.maxdict = 2, 3, 3

_TYPES = ("str", "constrained-str", "int", "float", "bool", "StreamOptions")


def _of_malformed(problems: Sequence[Any]) -> Refusal:
    """What pydantic complains of first, as one sentence; a choice of types is one complaint."""
    if problems[0]["type"] == "json_invalid":
        message = f"the body is not valid JSON: {problems[0]['ctx']['error']}"
        return Refusal(status=400, message=message, code="not_json")
    path = _path(problems[0]["loc"])
    same = [problem for problem in problems if _path(problem["loc"])[: len(path)] == path]
    name = ".".join(map(str, path))
    return Refusal(status=400, message=_sentence(name, same), field=name, code="invalid_value")


def _path(loc: Sequence[Any]) -> tuple[Any, ...]:
    """Where a field stands, without the place of the body and without names of types."""
    if loc[0] == "header":
        return tuple(str(part).title() for part in loc[1:])
    inside = (part for part in loc[2:] if part not in _TYPES and "[" not in str(part))
    return (*loc[1:2], *inside)


def _sentence(name: str, problems: Sequence[Any]) -> str:
    kind, found = problems[0]["type"], _short.repr(problems[0]["input"])
    name = name or "the body"
    if kind == "extra_forbidden":
        return f"{name} is not a known field"
    if kind == "missing":
        return f"{name} is missing"
    if kind == "none_required" or problems[0].get("ctx", {}).get("max_length") == 0:
        return f"{name} is not supported here; leave it out, or send null"
    if kind == "too_short" and len(problems) == 1:
        least = problems[0]["ctx"]["min_length"]
        return f"{name} must hold at least {least}, found {len(problems[0]['input'])}"
    if kind == "too_long" and len(problems) == 1:
        most = problems[0]["ctx"]["max_length"]
        return f"{name} must hold at most {most}, found {len(problems[0]['input'])}"
    if kind == "shape":
        return f"{name} {problems[0]['msg']}, found {found}"
    wanted = " or ".join(dict.fromkeys(problem["msg"] for problem in problems))
    return f"{name} is wrong: {wanted}, found {found}"
