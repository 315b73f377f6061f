"""What the gRPC methods refuse, and how they say it."""

import asyncio
from typing import Any
from unittest.mock import MagicMock

import grpc
import pytest
from google.protobuf.message import Message
from ray.serve.grpc_util import RayServegRPCContext

from gptmoe.errors import CheckpointError, Unavailable
from protos import generation_pb2 as messages
from serve.names import Ticket
from serve.refusals import Direct
from serve.rpc import Servicer
from serve.service import Service

from .asking import Context, ask, request, streamed, unary
from .full_engine import FullEngine

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def engine() -> FullEngine:
    return FullEngine()


@pytest.fixture
def servicer(service: Service) -> Servicer:
    servicer = Servicer()
    servicer.service = service
    return servicer


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (request(""), "prompt must be at least one character; found an empty text"),
        (request("春" * 64), "prompt must be at most 63 tokens"),
        (request(max_new_tokens=-5), "max_new_tokens must be at least 1; found -5"),
        (request(temperature=float("nan")), "temperature must be between 0 (greedy) and 100"),
        (request(temperature=-1), "temperature must be between"),
        (request(top_k=-1), "top_k must be at least 0"),
        (request(top_p=0), "top_p must be above 0"),
        (request(top_p=float("inf")), "top_p must be above 0"),
        (request(repetition_penalty=0), "repetition_penalty must be above 0"),
        (request(stop=[""]), "stop must be strings of at least one character"),
        (request(stop=["a"] * 10_000), "stop must be at most 16 of them; found 10000"),
        (request(stop=["a" * 1001]), "stop must be strings of at most 1000 characters"),
        (request(stop_token_ids=[-1]), "stop_token_ids must be token ids of at least 0"),
        (request(stop_token_ids=[0x110000]), "stop_token_ids must be token ids from 0 to 1114111"),
        (request(prompt_token_ids=[1]), "prompt must be a text or prompt_token_ids; found both"),
        (request("", prompt_token_ids=[-1]), "prompt_token_ids must be token ids from 0"),
        (request(resume_token_ids=[-1]), "resume_token_ids must be token ids from 0"),
        (request(resume_token_ids=[1] * 9, max_new_tokens=9), "resume_token_ids must be fewer"),
        (request(resume_token_ids=[1], n=2), "resume_token_ids must be empty with n"),
        (request(min_p=1.5), "min_p must be between 0"),
        (request(presence_penalty=float("nan")), "presence_penalty must be between"),
        (request(frequency_penalty=-101), "frequency_penalty must be between"),
        (request(logit_bias={-1: 1.0}), "logit_bias must be of token ids of at least 0"),
        (request(logit_bias={1: float("nan")}), "logit_bias must be of numbers between"),
        (request(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias must be at most 1024"),
        (request(n=0), "n must be between 1 and 16; found 0"),
        (request(n=2, temperature=0), "n must be 1 where temperature is 0"),
        (request(num_beams=2), "num_beams must be 1 unless temperature is 0"),
        (request(num_beams=3, num_beam_groups=2, temperature=0), "must be a divisor of num_beams"),
        (request(diversity_penalty=-1), "diversity_penalty must be between 0"),
        (request(length_penalty=float("inf")), "length_penalty must be between"),
        (request(top_logprobs=21), "top_logprobs must be between 0 and 20; found 21"),
        (request(priority=101), "priority must be a whole number between -100 and 100; found 101"),
        (request(deadline_ms=-1), "deadline_ms must be at least 0 (0 = none); found -1"),
        (request(request_id="春" * 201), "request_id must be at most 200 characters"),
        (b"\x0a\x02\xff\xfe", "prompt must be UTF-8 text; found other bytes"),
        (b"\xff\xff\xff\xff", "not a gptmoe.v1.GenerateRequest"),
        (b"\x0a\x7f", "not a gptmoe.v1.GenerateRequest"),
    ],
)
def test_bad_input_is_invalid_argument_with_a_sentence(
    servicer: Servicer, data: bytes, sentence: str
) -> None:
    response, context = unary(servicer, data)
    assert response == messages.GenerateResponse()
    assert context.code == INVALID
    assert sentence in context.details
    assert "\n" not in context.details

    chunks, stream_context = streamed(servicer, data)
    assert chunks == []
    assert (stream_context.code, stream_context.details) == (INVALID, context.details)


def test_a_full_queue_is_resource_exhausted(servicer: Servicer, engine: Any) -> None:
    engine.capacity = 0
    for call in (unary, streamed):
        _, context = call(servicer, request())
        assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "queue is full" in context.details
        assert context.trailing == [("grpc-retry-pushback-ms", "1500")]


def test_ray_serves_own_context_carries_the_time_to_come_back(
    servicer: Servicer, engine: Any
) -> None:
    """Beside what Ray Serve says itself; its proxy sets all of it on the call."""
    engine.capacity = 0
    call = MagicMock()
    call.invocation_metadata.return_value = []
    call.trailing_metadata.return_value = [("request_id", "of Ray Serve")]
    context = RayServegRPCContext(call)
    asyncio.run(servicer.Generate(request(), context))
    context._set_on_grpc_context(call)
    call.set_code.assert_called_once_with(grpc.StatusCode.RESOURCE_EXHAUSTED)
    call.set_trailing_metadata.assert_called_once_with(
        [("request_id", "of Ray Serve"), ("grpc-retry-pushback-ms", "1500")]
    )


def test_a_stopped_engine_is_unavailable(servicer: Servicer, service: Service) -> None:
    service.stop()
    for call in (unary, streamed):
        _, context = call(servicer, request())
        assert context.code == grpc.StatusCode.UNAVAILABLE
        assert "send the request again" in context.details


def test_any_other_error_of_ours_is_internal(
    servicer: Servicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(call: object) -> None:
        raise CheckpointError("weights-00001.safetensors is gone")

    monkeypatch.setattr(servicer.service, "complete", broken)
    _, context = unary(servicer, request())
    assert (context.code, context.details) == (
        grpc.StatusCode.INTERNAL,
        "weights-00001.safetensors is gone",
    )


@pytest.mark.parametrize("name", ["novels", "长" * 10_000])
def test_an_unknown_model_is_not_found(servicer: Servicer, name: str) -> None:
    for _, context in (
        unary(servicer, request(model=name)),
        streamed(servicer, request(model=name)),
        ask(servicer.GetModel, messages.GetModelRequest(model=name)),
        ask(servicer.Score, messages.ScoreRequest(prompt="春", continuations=["风"], model=name)),
    ):
        assert context.code == grpc.StatusCode.NOT_FOUND
        assert "is not served here; 'poems' is" in context.details
        assert len(context.details) < 300, "a status has little room"


@pytest.mark.parametrize(
    ("method", "message", "sentence"),
    [
        (
            "Tokenize",
            messages.TokenizeRequest(text="长" * 4097),
            "text must be at most 4096 characters; found 4097 characters",
        ),
        (
            "Detokenize",
            messages.DetokenizeRequest(token_ids=[5, -1]),
            "token_ids must be token ids from 0 to 1114111; found -1",
        ),
        (
            "Detokenize",
            messages.DetokenizeRequest(token_ids=[5] * 16385),
            "token_ids must be at most 16384 token ids; found 16385 token ids",
        ),
        (
            "Score",
            messages.ScoreRequest(continuations=["风"]),
            "prompt must be at least one character; found an empty text",
        ),
        (
            "Score",
            messages.ScoreRequest(prompt="春"),
            "continuations must be 1 to 64 texts; found 0",
        ),
        (
            "Score",
            messages.ScoreRequest(prompt="春", continuations=["风"] * 65),
            "continuations must be 1 to 64 texts; found 65",
        ),
        (
            "Score",
            messages.ScoreRequest(prompt="春", continuations=["风", ""]),
            "continuations[1] must be at least one character; found an empty text",
        ),
        (
            "Score",
            messages.ScoreRequest(prompt="春" * 60, continuations=["风", "风" * 4]),
            "continuations[1] must be at most 3 tokens, what the context has left behind this "
            "prompt; found 4 tokens",
        ),
        (
            "Score",
            messages.ScoreRequest(prompt="春" * 60, continuations=["风" * 1000]),
            "found 1000 characters",
        ),
        (
            "Score",
            messages.ScoreRequest(prompt="春", continuations=["风"], priority=-101),
            "priority must be a whole number between -100 and 100; found -101",
        ),
        (
            "Score",
            messages.ScoreRequest(prompt="春", continuations=["风"], deadline_ms=-1),
            "deadline_ms must be at least 0",
        ),
        (
            "Abort",
            messages.AbortRequest(),
            "request_id must be the id of a running request; found an empty text",
        ),
        (
            "Abort",
            messages.AbortRequest(request_id="x" * 201),
            "request_id must be at most 200 characters; found 201 characters",
        ),
    ],
)
def test_bad_input_of_the_other_methods(
    servicer: Servicer, method: str, message: Message, sentence: str
) -> None:
    _, context = ask(getattr(servicer, method), message)
    assert context.code == INVALID
    assert sentence in context.details


def test_a_drained_model_is_unavailable_and_running_texts_go_on(
    servicer: Servicer, service: Service
) -> None:
    async def drain_between() -> str:
        text = ""
        async for chunk in servicer.GenerateStream(request(max_new_tokens=5), Context()):
            service.draining = True
            text += chunk.text
        return text

    assert asyncio.run(drain_between()) == "一二三四五"
    for call in (unary, streamed):
        _, context = call(servicer, request())
        assert context.code == grpc.StatusCode.UNAVAILABLE
        assert "poems takes no new requests" in context.details


def test_a_score_whose_replica_died_goes_on_at_a_drained_model(
    servicer: Servicer, service: Service
) -> None:
    service.draining = True
    asked = messages.ScoreRequest(prompt="春", continuations=["风"]).SerializeToString()
    new, moved = Direct(Ticket("mine", 0)), Direct(Ticket("mine", 1))
    assert not asyncio.run(servicer.Score(asked, new)).scores
    assert isinstance(new.error, Unavailable)
    assert len(asyncio.run(servicer.Score(asked, moved)).scores) == 1
    assert moved.error is None
