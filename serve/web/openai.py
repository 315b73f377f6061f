"""What completions and chats answer alike: heads, usage, the events of a stream; and the models."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import pydantic
from fastapi import APIRouter
from fastapi.responses import Response

from gptmoe.errors import GptMoeError, NotFound
from gptmoe.generate.delta import Delta
from serve.service import Service

from .answers import (
    EVENT_CONTENT,
    CachedTokens,
    FinishReason,
    Model,
    Models,
    OpenAIRefusal,
    Usage,
    refusals,
)
from .door import JsonRoute
from .refusals import as_openai, refusal_of
from .streams import Placed, event

REFUSALS = refusals(OpenAIRefusal)

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream=true server-sent events, the last one [DONE].",
        "content": EVENT_CONTENT,
    }
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What all parts of an answer begin with."""

    kind: str
    request_id: str
    named: bool
    """Whether the caller chose it."""
    created: int
    model: str

    @staticmethod
    def of(kind: str, request_id: str | None, service: Service) -> "Head":
        """Of an answer that begins now; `kind` goes before the request's id."""
        name = request_id or uuid.uuid4().hex
        return Head(
            kind=kind,
            request_id=name,
            named=bool(request_id),
            created=int(time.time()),
            model=service.card.name,
        )

    def fields(self, weights_version: int) -> dict[str, Any]:
        """The same as the fields of an answer, with the weights that spoke."""
        return {
            "id": f"{self.kind}-{self.request_id}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"weights-{weights_version}",
        }


@dataclass(slots=True)
class Tally:
    """Counts the tokens of prompts and their answers."""

    prompts: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    completion: int = 0
    weights_version: int = 0

    def add(self, place: int, delta: Delta) -> None:
        """Count what is new for the prompt at `place`."""
        self.prompts[place] = delta.prompt_tokens
        self.cached[place] = max(delta.cached_tokens, self.cached.get(place, 0))
        self.completion += len(delta.token_ids)
        self.weights_version = max(delta.version, self.weights_version)

    def usage(self) -> Usage:
        prompt = sum(self.prompts.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.completion,
            total_tokens=prompt + self.completion,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(self.cached.values())),
        )


def tally_of(answers: Sequence[Sequence[Delta]]) -> Tally:
    """The tokens of all answers, by prompt."""
    tally = Tally()
    for place, deltas in enumerate(answers):
        for delta in deltas:
            tally.add(place, delta)
    return tally


async def pieces(
    stream: AsyncGenerator[Placed, None],
    write: Callable[[int, Delta], Sequence[pydantic.BaseModel]],
    close: Callable[[Tally], pydantic.BaseModel] | None,
) -> AsyncGenerator[str, None]:
    """The events of an answer: what `write` makes of each delta, what `close` makes of them all."""
    tally = Tally()
    async with aclosing(stream):
        async for place, delta in stream:
            tally.add(place, delta)
            yield "".join(map(event, write(place, delta)))
    if close:
        yield event(close(tally))
    yield "data: [DONE]\n\n"


def failed(error: GptMoeError) -> str:
    """The event that ends a stream which cannot go on; no [DONE] follows."""
    return f"data: {json.dumps(as_openai(refusal_of(error)), ensure_ascii=False)}\n\n"


def finish_reason(delta: Delta) -> FinishReason | None:
    """Why this answer ends, if it does."""
    return cast(FinishReason, delta.finish_reason) if delta.finish_reason else None


def answered(data: pydantic.BaseModel) -> Response:
    """A whole answer."""
    return Response(data.model_dump_json(), media_type="application/json")


def models_router(service: Service) -> APIRouter:
    """GET /v1/models, GET /v1/models/NAME."""
    known = Model(id=service.card.name, created=int(time.time()))
    router = APIRouter(route_class=JsonRoute)

    @router.get("/models", responses=refusals(OpenAIRefusal, 401), summary="What is served")
    async def models() -> Models:
        return Models(data=[known])

    refused = refusals(OpenAIRefusal, 401, 404)

    @router.get("/models/{model:path}", responses=refused, summary="Whether a model is served")
    async def retrieve(model: str) -> Model:
        if model != known.id:
            raise NotFound(f"model {model!r} is not served here; {known.id!r} is")
        return known

    return router
