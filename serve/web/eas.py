r"""POST /generate, POST /generate/stream: one text to continue, in the shape of PAI-EAS.

    {"inputs": ["床前明月光"], "parameters": {"max_length": 64, "top_k": 5}}
    -> {"text": prompt + continuation}

Newlines travel as the two characters \n: in what comes, \n and \" stand for a newline and a quote;
in what goes, each newline is \n.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gptmoe.errors import GptMoeError
from gptmoe.generate.delta import Delta
from gptmoe.generate.params import SamplingParams
from serve.service import Call, Service

from .answers import EVENT_CONTENT, PlainRefusal, refusals
from .door import JsonRoute
from .fields import (
    DEADLINE,
    PRIORITY,
    Milliseconds,
    PromptText,
    RequestId,
    StopStrings,
    StopTokens,
    Strict,
    Whole,
    described,
    listed,
    sampled,
)
from .refusals import as_plain, named, refusal_of
from .streams import answer_events, collected, while_connected

_DEFAULT = SamplingParams()


def received(text: str) -> str:
    """A text as it is meant."""
    return text.replace("\\n", "\n").replace('\\"', '"')


def sent(text: str) -> str:
    """A text as it is answered."""
    return text.replace("\n", "\\n")


class Parameters(Strict):
    """How to sample; max_length counts new tokens."""

    max_length: Whole = sampled("max_new_tokens", _DEFAULT.max_new_tokens, "New tokens at most.")
    temperature: float = sampled("temperature", _DEFAULT.temperature, "0: greedy.")
    top_k: Whole = sampled("top_k", _DEFAULT.top_k, "0: all tokens.")
    top_p: float = sampled("top_p", _DEFAULT.top_p, "1: all tokens.")
    min_p: float = sampled("min_p", _DEFAULT.min_p, "0: all tokens.")
    repetition_penalty: float = sampled(
        "repetition_penalty", _DEFAULT.repetition_penalty, "1: none."
    )
    presence_penalty: float = sampled("presence_penalty", 0.0, "0: none.")
    frequency_penalty: float = sampled("frequency_penalty", 0.0, "0: none.")
    seed: int = sampled("seed", _DEFAULT.seed, "The same seed, the same text.")
    stop: StopStrings = described([], "The text ends before these.")
    stop_token_ids: StopTokens = described([], "The text ends before these tokens.")
    num_beams: Whole = sampled("num_beams", 1, "1: no beam search.")
    num_beam_groups: Whole = sampled("num_beam_groups", 1, "Of beams that differ.")
    diversity_penalty: float = sampled("diversity_penalty", 0.0, "Between groups.")
    length_penalty: float = sampled("length_penalty", 1.0, "Of beams.")
    deadline_ms: Milliseconds | None = DEADLINE
    priority: Whole = PRIORITY

    def sampling(self) -> SamplingParams:
        """These parameters as the engine's. Raises RequestError for what is out of range."""
        given = self.model_dump(exclude={"deadline_ms", "priority", "max_length"})
        given["stop"] = tuple(map(received, self.stop))
        given["stop_token_ids"] = tuple(self.stop_token_ids)
        return SamplingParams(**given, max_new_tokens=self.max_length)


_NAMES = {name: f"parameters.{name}" for name in Parameters.model_fields} | {
    "prompt": "inputs",
    "max_new_tokens": "parameters.max_length",
    "request_id": "X-Request-Id",
}


class GenerateBody(Strict):
    """One prompt, and how to continue it."""

    inputs: Annotated[list[PromptText], listed(1, 1)]
    parameters: Parameters = pydantic.Field(default_factory=Parameters)
    stream: bool = described(False, "Answer as /generate/stream does.")

    @property
    def prompt(self) -> str:
        return received(self.inputs[0])

    def call(self, request_id: str | None = None) -> Call:
        """Raises RequestError."""
        asked = self.parameters
        call = Call(
            prompt=self.prompt,
            sampling=asked.sampling(),
            seeded="seed" in asked.model_fields_set,
            priority=asked.priority,
            deadline_s=asked.deadline_ms / 1000 if asked.deadline_ms else None,
        )
        return replace(call, request_id=request_id, named=True) if request_id else call


class GenerateAnswer(pydantic.BaseModel):
    """The prompt and its continuation."""

    text: str


EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events: text and token_ids of each piece, without the prompt; "
        "the last with finish_reason, prompt_tokens and completion_tokens, or an error.",
        "content": EVENT_CONTENT,
    }
}


def router(service: Service) -> APIRouter:
    """POST /generate and POST /generate/stream."""
    router = APIRouter(route_class=JsonRoute, responses=refusals(PlainRefusal))

    async def stream(body: GenerateBody, request: Request, request_id: str | None) -> Response:
        events = _events(service.stream(body.call(request_id)))
        return await answer_events(request.receive, events, _failed)

    @router.post(
        "/generate", response_model=GenerateAnswer, responses=EVENTS, summary="Continue a text"
    )
    async def generate(
        body: GenerateBody, request: Request, x_request_id: RequestId = None
    ) -> Response:
        with named(_NAMES):
            if body.stream:
                return await stream(body, request, x_request_id)
            work = collected(service, [body.call(x_request_id)])
            [[answer]] = await while_connected(request.receive, work)
            return JSONResponse({"text": sent(body.prompt + answer.text)})

    @router.post("/generate/stream", responses=EVENTS, summary="Continue a text piece by piece")
    async def generate_stream(
        body: GenerateBody, request: Request, x_request_id: RequestId = None
    ) -> Response:
        with named(_NAMES):
            return await stream(body, request, x_request_id)

    return router


async def _events(deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[str, None]:
    """One event per delta; the last has finish_reason and the numbers of tokens."""
    completion_tokens = 0
    async with aclosing(deltas):
        async for delta in deltas:
            completion_tokens += len(delta.token_ids)
            data: dict[str, Any] = {"text": sent(delta.text), "token_ids": delta.token_ids}
            if delta.finish_reason:
                data["finish_reason"] = delta.finish_reason
                data["prompt_tokens"] = delta.prompt_tokens
                data["completion_tokens"] = completion_tokens
            yield _event(data)


def _failed(error: GptMoeError) -> str:
    return _event(as_plain(refusal_of(error)))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
