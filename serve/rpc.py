"""The gRPC service gptmoe.v1.Generation, as Ray Serve's proxy calls it. Messages stop here.

The proxy hands over a request as the bytes that came (see proxy.py), and a context for the status.
With Ray Serve 2.60 a unary method sets code and details and returns; a streaming method must raise
after setting them: returning before the first message, it would look like a stream that ended well.
"""

import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, fields
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from gptmoe.errors import GptMoeError, RequestError
from gptmoe.generate.delta import Delta
from gptmoe.generate.params import SamplingParams, biases, check
from protos import generation_pb2 as messages

from .refusals import Context, set_status
from .service import Call, Service

M = TypeVar("M", bound=Message)

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
        try:
            done = await self.service.complete(_call(request))
        except GptMoeError as error:
            set_status(error, grpc_context)
            return messages.GenerateResponse()
        return messages.GenerateResponse(
            text=done.text,
            token_ids=done.token_ids,
            finish_reason=_REASONS[done.finish_reason],
            prompt_tokens=done.prompt_tokens,
            completion_tokens=len(done.token_ids),
            request_id=done.request_id,
            logprobs=done.logprobs,
            weights_version=done.weights_version,
        )

    async def GenerateStream(
        self, request: bytes, grpc_context: Context
    ) -> AsyncIterator[messages.GenerateChunk]:
        try:
            call = _call(request)
            chunks = completion_tokens = 0
            async with aclosing(self.service.stream(call)) as deltas:
                async for delta in deltas:
                    completion_tokens += len(delta.token_ids)
                    yield messages.GenerateChunk(
                        text=delta.text,
                        token_ids=delta.token_ids,
                        header=None if chunks else _header(call, delta, self.service.card.name),
                        finish=_finish(delta, completion_tokens),
                        logprobs=delta.logprobs,
                    )
                    chunks += 1
        except GptMoeError as error:
            set_status(error, grpc_context)
            raise

    async def GetModel(self, request: bytes, grpc_context: Context) -> messages.ModelInfo:
        try:
            _read(messages.GetModelRequest, request)
        except RequestError as error:
            set_status(error, grpc_context)
            return messages.ModelInfo()
        return messages.ModelInfo(**asdict(self.service.card))

    async def _not_yet(self, request: bytes, grpc_context: Context) -> Message:
        grpc_context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        return messages.AbortResponse()

    Score = Tokenize = Detokenize = ListModels = Abort = _not_yet


def _call(data: bytes) -> Call:
    message = _read(messages.GenerateRequest, data)
    check(
        not (message.prompt and message.prompt_token_ids),
        "prompt",
        "both",
        "a text or prompt_token_ids",
    )
    check(message.deadline_ms >= 0, "deadline_ms", message.deadline_ms, "at least 0 (0 = none)")
    return Call(
        prompt=tuple(message.prompt_token_ids) or message.prompt,
        sampling=_sampling(message),
        request_id=message.request_id or uuid.uuid4().hex,
        model=message.model,
        resume_ids=tuple(message.resume_token_ids),
        priority=message.priority,
        deadline_s=message.deadline_ms / 1000 if message.deadline_ms else None,
        transport="grpc",
    )


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
    try:
        return kind.FromString(data)
    except DecodeError as error:
        name = kind.DESCRIPTOR.full_name
        raise RequestError(f"the request is not a {name} with UTF-8 text: {error}") from None


def _header(call: Call, delta: Delta, model: str) -> messages.StreamHeader:
    return messages.StreamHeader(
        request_id=call.request_id, prompt_tokens=delta.prompt_tokens, model=model
    )


def _finish(delta: Delta, completion_tokens: int) -> messages.StreamFinish | None:
    if not delta.finish_reason:
        return None
    return messages.StreamFinish(
        reason=_REASONS[delta.finish_reason],
        completion_tokens=completion_tokens,
        weights_version=delta.version,
    )
