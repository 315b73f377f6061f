"""The gRPC service gptmoe.v1.Generation, as Ray Serve's proxy calls it. Messages stop here.

The proxy hands over a request as the bytes that came (see proxy.py), and a context for the status.
With Ray Serve 2.60 a unary method sets code and details and returns; a streaming method must raise
after setting them: returning before the first message, it would look like a stream that ended well.
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, fields
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from cluster import wire
from gptmoe.errors import GptMoeError
from gptmoe.generate.delta import Delta, Timings, TopLogprobs
from gptmoe.generate.params import SamplingParams, biases, check
from protos import generation_pb2 as messages

from .access_log import current
from .completion import Choice
from .names import Ticket
from .refusals import Context, set_status, ticket_of
from .scoring import ScoreCall
from .service import Call, Service

M = TypeVar("M", bound=Message)
A = TypeVar("A", bound=Message)

HEADER_WAITS_S = 0.1
"""A stream's header waits so long for the first token, to leave just before it."""
_SWITCHES = ("logprobs", "top_logprobs", "prompt_logprobs")
"""What is off unless it is asked for."""

_REASONS = {
    "stop": messages.FINISH_REASON_STOP,
    "length": messages.FINISH_REASON_LENGTH,
    "abort": messages.FINISH_REASON_ABORT,
}


class Servicer:
    """The methods of the service; a deployment class inherits them. Names are the service's own."""

    service: Service

    async def Generate(self, request: bytes, grpc_context: Context) -> messages.GenerateResponse:
        asked, answer = messages.GenerateRequest, messages.GenerateResponse
        method = partial(self._generate, ticket_of(grpc_context))
        return await _unary(request, asked, method, answer, grpc_context)

    async def GenerateStream(
        self, request: bytes, grpc_context: Context
    ) -> AsyncIterator[messages.GenerateChunk]:
        try:
            call = _call(_read(messages.GenerateRequest, request), ticket_of(grpc_context))
            tokens: Counter[int] = Counter()
            async with self.service.opened(call) as running, _begun(running.deltas) as first:
                yield messages.GenerateChunk(
                    header=messages.StreamHeader(
                        request_id=call.request_id,
                        prompt_tokens=len(running.request.prompt_ids),
                        model=self.service.card.name,
                    )
                )
                async for delta in _all(first, running.deltas):
                    tokens[delta.index] += len(delta.token_ids)
                    yield _chunk(delta, tokens[delta.index])
        except GptMoeError as error:
            set_status(error, grpc_context)
            raise

    async def Score(self, request: bytes, grpc_context: Context) -> messages.ScoreResponse:
        asked, answer = messages.ScoreRequest, messages.ScoreResponse
        method = partial(self._score, ticket_of(grpc_context))
        return await _unary(request, asked, method, answer, grpc_context)

    async def Tokenize(self, request: bytes, grpc_context: Context) -> messages.TokenizeResponse:
        asked, answer = messages.TokenizeRequest, messages.TokenizeResponse
        return await _unary(request, asked, self._tokenize, answer, grpc_context)

    async def Detokenize(
        self, request: bytes, grpc_context: Context
    ) -> messages.DetokenizeResponse:
        asked, answer = messages.DetokenizeRequest, messages.DetokenizeResponse
        return await _unary(request, asked, self._detokenize, answer, grpc_context)

    async def GetModel(self, request: bytes, grpc_context: Context) -> messages.ModelInfo:
        asked, answer = messages.GetModelRequest, messages.ModelInfo
        return await _unary(request, asked, self._model, answer, grpc_context)

    async def ListModels(
        self, request: bytes, grpc_context: Context
    ) -> messages.ListModelsResponse:
        asked, answer = messages.ListModelsRequest, messages.ListModelsResponse
        return await _unary(request, asked, self._models, answer, grpc_context)

    async def Abort(self, request: bytes, grpc_context: Context) -> messages.AbortResponse:
        asked, answer = messages.AbortRequest, messages.AbortResponse
        return await _unary(request, asked, self._abort, answer, grpc_context)

    async def _generate(
        self, ticket: Ticket, message: messages.GenerateRequest
    ) -> messages.GenerateResponse:
        done = await self.service.complete(_call(message, ticket))
        first = done.choices[0]
        return messages.GenerateResponse(
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=_REASONS[first.finish_reason],
            logprobs=first.logprobs,
            prompt_tokens=done.prompt_tokens,
            completion_tokens=done.completion_tokens,
            request_id=done.request_id,
            weights_version=done.weights_version,
            choices=map(_choice, done.choices),
            prompt_logprobs=done.prompt_logprobs,
            timings=_timings(done.timings),
            cached_tokens=done.cached_tokens,
            model=self.service.card.name,
        )

    async def _score(
        self, ticket: Ticket, message: messages.ScoreRequest
    ) -> messages.ScoreResponse:
        call = ScoreCall(
            prompt=message.prompt,
            continuations=tuple(message.continuations),
            model=message.model,
            ticket=ticket,
            priority=message.priority,
            deadline_s=_deadline_s(message.deadline_ms),
        )
        scores = await self.service.score(call)
        return messages.ScoreResponse(scores=[messages.Scored(**asdict(it)) for it in scores])

    async def _tokenize(self, message: messages.TokenizeRequest) -> messages.TokenizeResponse:
        ids, tokens = await self.service.texts.tokenize(message.text)
        return messages.TokenizeResponse(token_ids=ids, tokens=tokens)

    async def _detokenize(self, message: messages.DetokenizeRequest) -> messages.DetokenizeResponse:
        return messages.DetokenizeResponse(
            text=await self.service.texts.detokenize(tuple(message.token_ids))
        )

    async def _model(self, message: messages.GetModelRequest) -> messages.ModelInfo:
        return messages.ModelInfo(**asdict(self.service.model(message.model)))

    async def _models(self, message: messages.ListModelsRequest) -> messages.ListModelsResponse:
        return messages.ListModelsResponse(models=[await self._model(messages.GetModelRequest())])

    async def _abort(self, message: messages.AbortRequest) -> messages.AbortResponse:
        await self.service.abort(message.request_id)
        return messages.AbortResponse()


@asynccontextmanager
async def _begun(deltas: AsyncIterator[Delta]) -> AsyncIterator[Awaitable[Delta]]:
    """The first delta, waited for during HEADER_WAITS_S; in the block, perhaps still to come.

    A header that travels while the prompt is computed costs the computation more than its caller
    gains: three processes wake up for it.
    """
    first = asyncio.ensure_future(anext(deltas))
    try:
        await asyncio.wait([first], timeout=HEADER_WAITS_S)
        yield first
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def _all(first: Awaitable[Delta], others: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield await first
    async for delta in others:
        yield delta


async def _unary(
    data: bytes,
    asked: type[M],
    method: Callable[[M], Awaitable[A]],
    answer: type[A],
    context: Context,
) -> A:
    """A method's answer; after a refusal an empty one, with the status set."""
    try:
        return await method(_read(asked, data))
    except GptMoeError as error:
        set_status(error, context)
        return answer()


def _call(message: messages.GenerateRequest, ticket: Ticket) -> Call:
    """A request as the service takes it; what its caller has not named has its ticket's name."""
    check(
        not (message.prompt and message.prompt_token_ids),
        "prompt",
        "both",
        "a text or prompt_token_ids",
    )
    return Call(
        prompt=tuple(message.prompt_token_ids) or message.prompt,
        sampling=_sampling(message),
        request_id=message.request_id or ticket.holder or uuid.uuid4().hex,
        named=bool(message.request_id),
        ticket=ticket,
        seeded=message.HasField("seed"),
        model=message.model,
        resume_ids=tuple(message.resume_token_ids),
        priority=message.priority,
        deadline_s=_deadline_s(message.deadline_ms),
    )


def _deadline_s(deadline_ms: int) -> float | None:
    check(deadline_ms >= 0, "deadline_ms", deadline_ms, "at least 0 (0 = none)")
    return deadline_ms / 1000 if deadline_ms else None


def _sampling(message: messages.GenerateRequest) -> SamplingParams:
    """What is absent keeps its default."""
    given: dict[str, Any] = {}
    for field in fields(SamplingParams):
        value = getattr(message, field.name)
        if field.name == "logit_bias":
            given[field.name] = biases(value)
        elif field.name in ("stop", "stop_token_ids"):
            given[field.name] = tuple(value)
        elif field.name in _SWITCHES or message.HasField(field.name):
            given[field.name] = value
    return SamplingParams(**given)


def _read(kind: type[M], data: bytes) -> M:
    """The request; the access log calls it by its name from here on."""
    message = wire.request(kind, data)
    current().name(getattr(message, "request_id", ""))
    return message


def _chunk(delta: Delta, completion_tokens: int) -> messages.GenerateChunk:
    """`completion_tokens`: of this index, so far."""
    return messages.GenerateChunk(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs,
        top_logprobs=map(_top, delta.top_logprobs),
        prompt_logprobs=[score.logprob for score in delta.prompt_scores],
        finish=_finish(delta, completion_tokens),
    )


def _finish(delta: Delta, completion_tokens: int) -> messages.StreamFinish | None:
    if not delta.finish_reason:
        return None
    return messages.StreamFinish(
        reason=_REASONS[delta.finish_reason],
        completion_tokens=completion_tokens,
        weights_version=delta.version,
        timings=_timings(delta.timings or Timings()),
        cached_tokens=delta.cached_tokens,
        cumulative_logprob=delta.cumulative_logprob,
    )


def _choice(choice: Choice) -> messages.Choice:
    return messages.Choice(
        index=choice.index,
        text=choice.text,
        token_ids=choice.token_ids,
        finish_reason=_REASONS[choice.finish_reason],
        logprobs=choice.logprobs,
        top_logprobs=map(_top, choice.top_logprobs),
        cumulative_logprob=choice.cumulative_logprob,
    )


def _top(places: TopLogprobs) -> messages.TopLogprobs:
    return messages.TopLogprobs(
        token_ids=[token for token, _ in places], logprobs=[value for _, value in places]
    )


def _timings(timings: Timings) -> messages.Timings:
    return messages.Timings(**asdict(timings))
