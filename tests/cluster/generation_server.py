"""A server of the service Generation in this process, for the client's tests."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc

from cluster.client import Model
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services

SAMPLING: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {5: -1.0},
    "seed": 7,
    "n": 2,
    "num_beams": 4,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "length_penalty": 1.5,
    "max_new_tokens": 3,
    "stop": ["。"],
    "stop_token_ids": [9],
    "ignore_end": True,
    "logprobs": True,
    "top_logprobs": 2,
    "prompt_logprobs": True,
    "request_id": "mine",
    "model": "poems",
    "resume_token_ids": [8],
    "deadline_ms": 5000,
    "priority": -3,
}
TOP = messages.TopLogprobs(token_ids=[1, 4], logprobs=[-0.5, -2.0])
TIMES = {"queue_s": 0.25, "first_token_s": 0.5, "total_s": 1.0}
MODEL = Model(
    name="poems",
    parameters=2**40,
    active_parameters=2,
    max_seq_len=64,
    vocab_size=100,
    dtype="float32",
    num_layers=2,
    d_model=8,
    num_heads=2,
    num_experts=(4, 8),
)


class Server(services.GenerationServicer):
    """Answers with three characters; the prompt says how to misbehave."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.left = threading.Event()
        self.pushback: str | None = None

    def Generate(self, request: messages.GenerateRequest, context: Any) -> Any:
        self.requests.append(request)
        self._refuse_if_full(request, context)
        if request.prompt == "bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "top_k must be at least 0; found -1")
        first = {"text": "一", "token_ids": [1], "logprobs": [-0.5]}
        first["finish_reason"] = messages.FINISH_REASON_STOP
        return messages.GenerateResponse(
            **first,
            prompt_tokens=2,
            completion_tokens=3,
            request_id=request.request_id,
            weights_version=4,
            choices=[
                messages.Choice(**first, top_logprobs=[TOP], cumulative_logprob=-0.5),
                messages.Choice(index=1, text="二三", token_ids=[2, 3], finish_reason=3),
            ],
            prompt_logprobs=[-1.5],
            timings=messages.Timings(**TIMES),
            cached_tokens=1,
            model="poems",
        )

    def GenerateStream(self, request: messages.GenerateRequest, context: Any) -> Iterator[Any]:
        self.requests.append(request)
        context.add_callback(self.left.set)
        self._refuse_if_full(request, context)
        header = messages.StreamHeader(request_id="mine", prompt_tokens=2, model="poems")
        yield messages.GenerateChunk(header=header)
        yield messages.GenerateChunk(
            text="一", token_ids=[1], logprobs=[-0.5], top_logprobs=[TOP], prompt_logprobs=[-1.5]
        )
        if request.prompt == "bad":
            context.abort(grpc.StatusCode.UNAVAILABLE, "the engine has stopped")
        while request.prompt == "endless" and context.is_active():
            yield messages.GenerateChunk(text="一", token_ids=[1])
        finish = messages.StreamFinish(
            reason=messages.FINISH_REASON_LENGTH,
            completion_tokens=3,
            weights_version=4,
            timings=messages.Timings(**TIMES),
            cached_tokens=1,
            cumulative_logprob=-0.5,
        )
        yield messages.GenerateChunk(text="二三", token_ids=[2, 3], index=1, finish=finish)

    def _refuse_if_full(self, request: messages.GenerateRequest, context: Any) -> None:
        if request.prompt == "full":
            if self.pushback is not None:
                context.set_trailing_metadata([("grpc-retry-pushback-ms", self.pushback)])
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")

    def Score(self, request: messages.ScoreRequest, context: Any) -> Any:
        self.requests.append(request)
        scored = messages.Scored(token_ids=[1, 2], logprobs=[-0.5, -1.5], logprob=-2, greedy=True)
        return messages.ScoreResponse(scores=[scored])

    def Tokenize(self, request: messages.TokenizeRequest, context: Any) -> Any:
        self.requests.append(request)
        return messages.TokenizeResponse(token_ids=[1, 2], tokens=["春", "\ufffd"])

    def Detokenize(self, request: messages.DetokenizeRequest, context: Any) -> Any:
        self.requests.append(request)
        return messages.DetokenizeResponse(text="春风")

    def Abort(self, request: messages.AbortRequest, context: Any) -> Any:
        self.requests.append(request)
        if request.request_id == "gone":
            context.abort(grpc.StatusCode.NOT_FOUND, "no request 'gone' is running")
        return messages.AbortResponse()

    def ListModels(self, request: messages.ListModelsRequest, context: Any) -> Any:
        return messages.ListModelsResponse(models=[_described()] * 2)

    def GetModel(self, request: messages.GetModelRequest, context: Any) -> Any:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        return _described()


def _described() -> messages.ModelInfo:
    fields = {name: getattr(MODEL, name) for name in Model.__dataclass_fields__}
    return messages.ModelInfo(**fields)
