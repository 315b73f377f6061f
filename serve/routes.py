"""HTTP: POST /generate in the EAS shape, server-sent events, GET /model, GET /healthz.

    {"inputs": ["床前明月光"], "parameters": {"max_length": 64, "top_k": 5}}
    -> {"text": prompt + continuation}

Every refusal is {"error": {"message", "field"}} with one sentence: 400 for a bad request, 429 with
Retry-After for a full queue, 503 while the engine is down.
"""

import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

import pydantic
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from gptmoe.errors import GptMoeError, Overloaded, RequestError, Unavailable
from gptmoe.generate.delta import Delta
from gptmoe.generate.params import SamplingParams

from .service import Call, Service

_DEFAULT = SamplingParams()

_FIELDS = {"prompt": "inputs", "max_new_tokens": "parameters.max_length"}
"""What HTTP calls a field of a Call; a sampling parameter not named here keeps its name."""


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Parameters(Strict):
    """How to sample; max_length counts new tokens."""

    max_length: int = _DEFAULT.max_new_tokens
    temperature: float = _DEFAULT.temperature
    top_k: int = _DEFAULT.top_k
    top_p: float = _DEFAULT.top_p
    repetition_penalty: float = _DEFAULT.repetition_penalty
    seed: int = _DEFAULT.seed
    stop: list[str] = []


class GenerateBody(Strict):
    """One prompt, and how to continue it."""

    inputs: Annotated[list[str], pydantic.Field(min_length=1, max_length=1)]
    parameters: Parameters = Parameters()
    stream: bool = False

    def call(self) -> Call:
        given = self.parameters.model_dump()
        given["max_new_tokens"] = given.pop("max_length")
        sampling = SamplingParams(**given | {"stop": tuple(self.parameters.stop)})
        return Call(prompt=self.inputs[0], sampling=sampling, transport="http")


def build(service: Service, stall_s: float) -> FastAPI:
    """The HTTP application in front of `service`; unhealthy after a step of `stall_s` seconds."""
    app = FastAPI(title="gptmoe", summary="Continue Chinese text", redoc_url=None)
    app.add_exception_handler(GptMoeError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_malformed)
    app.add_exception_handler(HTTPException, _on_http)

    @app.post("/generate")
    async def generate(body: GenerateBody) -> Response:
        if body.stream:
            return await generate_stream(body)
        call = body.call()
        done = await service.complete(call)
        return JSONResponse({"text": body.inputs[0] + done.text})

    @app.post("/generate/stream")
    async def generate_stream(body: GenerateBody) -> Response:
        deltas = service.stream(body.call())
        first = await anext(deltas)  # a refusal becomes a status, before the stream begins
        return StreamingResponse(_events(first, deltas), media_type="text/event-stream")

    @app.get("/model")
    async def model() -> Response:
        return JSONResponse(asdict(service.card))

    @app.get("/healthz")
    async def healthz() -> Response:
        service.check(stall_s)
        return JSONResponse({"status": "ok"})

    return app


async def _events(first: Delta, rest: AsyncGenerator[Delta, None]) -> AsyncIterator[str]:
    """One event per delta; the last has finish_reason and the numbers of tokens, or is an error."""
    async with aclosing(rest):
        tokens = 0
        delta: Delta | None = first
        try:
            while delta is not None:
                tokens += len(delta.token_ids)
                yield _event(_plain(delta, tokens))
                delta = await anext(rest, None)
        except GptMoeError as error:
            yield _event({"error": {"message": str(error), "field": ""}})


def _plain(delta: Delta, completion_tokens: int) -> dict[str, Any]:
    event: dict[str, Any] = {"text": delta.text, "token_ids": delta.token_ids}
    if delta.finish_reason:
        event["finish_reason"] = delta.finish_reason
        event["prompt_tokens"] = delta.prompt_tokens
        event["completion_tokens"] = completion_tokens
    return event


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        field = _FIELDS.get(error.field, f"parameters.{error.field}" if error.field else "")
        return _refusal(400, error.message.replace(error.field, field, 1), field)
    if isinstance(error, Overloaded):
        retry = {"Retry-After": str(math.ceil(error.retry_after_s))}
        return _refusal(429, error.message, "", retry)
    if isinstance(error, Unavailable):
        retry = {"Retry-After": str(math.ceil(error.retry_after_s))}
        return _refusal(503, error.message, "", retry)
    return _refusal(503, str(error), "")


async def _on_malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    field, sentence = _explain(error.errors()[0])
    return _refusal(400, sentence, field)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, UnicodeDecodeError):
        return _refusal(400, "the body is not UTF-8 text", "")
    return _refusal(error.status_code, error.detail, "", error.headers)


def _refusal(status: int, message: str, field: str, headers: Any = None) -> Response:
    return JSONResponse({"error": {"message": message, "field": field}}, status, headers)


def _explain(problem: dict[str, Any]) -> tuple[str, str]:
    """The field that pydantic complains of, and one sentence about it."""
    path = [part for part in problem["loc"] if part != "body"]
    kind = problem["type"]
    if kind == "json_invalid":
        return "", f"the body is not valid JSON: {problem['ctx']['error']}"
    field = ".".join(map(str, path)) or "the body"
    if kind == "extra_forbidden":
        return field, f"{field} is not a known field"
    if kind == "missing":
        return field, f"{field} is missing"
    if field == "inputs" and kind in ("too_short", "too_long"):
        return field, f"inputs must hold exactly one text, found {len(problem['input'])}"
    found = repr(problem["input"])
    return field, f"{field} is wrong: {problem['msg']}, found {found[:80]}"
