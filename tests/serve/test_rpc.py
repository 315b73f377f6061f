"""The gRPC methods, without Ray: bytes in, messages and statuses out."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message

from cluster.operations import DrainRequest, DrainResponse
from protos import control_pb2
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services
from protos.control_pb2_grpc import ClusterControlStub
from serve.control import ControlServicer
from serve.proxy import add_services
from serve.rpc import Servicer
from serve.service import Service

from .asking import Context, ask, request, streamed, unary
from .full_engine import CACHED, FullEngine

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def engine() -> FullEngine:
    return FullEngine()


@pytest.fixture
def servicer(service: Service) -> Servicer:
    servicer = Servicer()
    servicer.service = service
    return servicer


def tokens_of(text: str) -> list[int]:
    return [ord(character) for character in text]


LENGTH = messages.FINISH_REASON_LENGTH
TIMES = messages.Timings(queue_s=0.25, first_token_s=0.5, total_s=3)
ALL: dict[str, Any] = {
    "max_new_tokens": 3,
    "n": 2,
    "seed": 7,
    "logprobs": True,
    "top_logprobs": 2,
    "prompt_logprobs": True,
    "request_id": "mine",
}


def test_unary_answers_with_the_continuation(servicer: Servicer) -> None:
    response, context = unary(servicer, request(max_new_tokens=3, request_id="mine"))
    assert context.code is None
    first = {"text": "一二三", "token_ids": tokens_of("一二三"), "finish_reason": LENGTH}
    assert response == messages.GenerateResponse(
        **first,
        prompt_tokens=2,
        completion_tokens=3,
        request_id="mine",
        choices=[messages.Choice(**first)],
        timings=TIMES,
        cached_tokens=CACHED,
        model="poems",
    )


def test_all_that_a_caller_asks_for_is_in_the_answer(servicer: Servicer, engine: Any) -> None:
    engine.version = 4
    response, _ = unary(servicer, request(**ALL))
    assert [choice.text for choice in response.choices] == ["一二三", "二三四"]
    assert response.completion_tokens == 6
    assert response.weights_version == 4
    assert list(response.prompt_logprobs) == [-0.5], "of the prompt's second token"
    for choice in response.choices:
        assert list(choice.logprobs) == [-0.25, -0.5, -0.75]
        assert choice.cumulative_logprob == -1.5
        assert choice.finish_reason == LENGTH
        places = zip(choice.top_logprobs, choice.token_ids, choice.logprobs, strict=True)
        for place, token, logprob in places:
            expected = {"token_ids": [token, 7], "logprobs": [logprob, -9.0]}
            assert place == messages.TopLogprobs(**expected)
    assert list(response.logprobs) == list(response.choices[0].logprobs)


def test_streamed_chunks_joined_are_the_unary_answer(servicer: Servicer) -> None:
    data = request(**ALL)
    response, _ = unary(servicer, data)
    (first, *chunks), _ = streamed(servicer, data)
    header = messages.StreamHeader(request_id="mine", prompt_tokens=2, model="poems")
    assert first == messages.GenerateChunk(header=header), "which has nothing else"
    assert not any(chunk.HasField("header") for chunk in chunks)
    assert list(chunks[0].prompt_logprobs) == list(response.prompt_logprobs)
    assert not any(chunk.prompt_logprobs for chunk in chunks[1:])
    for choice in response.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        *some, last = mine
        assert not any(chunk.HasField("finish") for chunk in some)
        assert last.finish == messages.StreamFinish(
            reason=choice.finish_reason,
            completion_tokens=3,
            timings=TIMES,
            cached_tokens=CACHED,
            cumulative_logprob=choice.cumulative_logprob,
        )
        assert "".join(chunk.text for chunk in mine) == choice.text
        for field in ("token_ids", "logprobs", "top_logprobs"):
            joined = [item for chunk in mine for item in getattr(chunk, field)]
            assert joined == list(getattr(choice, field))


def test_the_header_comes_before_the_first_token(servicer: Servicer, engine: Any) -> None:
    """And so does the name that the server makes: it is needed for Abort."""

    async def first() -> messages.GenerateChunk:
        stream = servicer.GenerateStream(request(max_new_tokens=2), Context())
        header = await asyncio.wait_for(anext(stream), 5)
        produced = dict(engine.produced)
        await stream.aclose()
        assert header.header.request_id in produced
        return header

    assert asyncio.run(first()).header.request_id


def test_stop_strings_end_the_text(servicer: Servicer) -> None:
    response, _ = unary(servicer, request(stop=["四"]))
    assert response.text == "一二三"
    assert response.finish_reason == messages.FINISH_REASON_STOP


def test_absent_fields_have_the_defaults_and_zero_is_a_value(servicer: Servicer) -> None:
    response, _ = unary(servicer, request())
    assert response.completion_tokens == 128
    _, context = unary(servicer, request(max_new_tokens=0))
    assert context.code == INVALID


def test_a_deadline_ends_a_text(servicer: Servicer, engine: Any) -> None:
    data = request(deadline_ms=50, max_new_tokens=10**9)
    _, context = unary(servicer, data)
    assert context.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert context.details.startswith("the deadline of 0.05 s has passed after ")
    chunks, context = streamed(servicer, data)
    assert context.code == grpc.StatusCode.DEADLINE_EXCEEDED
    tokens = sum(len(chunk.token_ids) for chunk in chunks)
    assert f"after {tokens} tokens were generated" in context.details
    assert not any(chunk.HasField("finish") for chunk in chunks)
    assert not engine.has_work


def test_priority_and_resuming_reach_the_engine(servicer: Servicer, engine: Any) -> None:
    whole, _ = unary(servicer, request(max_new_tokens=6))
    ids = tokens_of("一二三四")
    rest, _ = unary(servicer, request(max_new_tokens=6, resume_token_ids=ids, priority=-5))
    assert whole.text == "一二三四" + rest.text
    assert (engine.seen[-1].resume_ids, engine.seen[-1].priority) == (tuple(ids), -5)


def test_token_ids_are_a_prompt_as_their_text_is(servicer: Servicer, engine: Any) -> None:
    unary(servicer, request("春风"))
    unary(servicer, request("", prompt_token_ids=tokens_of("春风")))
    assert engine.seen[0].prompt_ids == engine.seen[1].prompt_ids


CARD = messages.ModelInfo(
    name="poems",
    parameters=1000,
    active_parameters=400,
    max_seq_len=64,
    vocab_size=0x110000,
    dtype="float32",
    num_layers=2,
    d_model=8,
    num_heads=2,
    num_experts=[4],
)


def test_the_model_describes_itself(servicer: Servicer) -> None:
    for name in ("", "poems"):
        assert ask(servicer.GetModel, messages.GetModelRequest(model=name))[0] == CARD
    models, _ = ask(servicer.ListModels, messages.ListModelsRequest())
    assert list(models.models) == [CARD]
    context = Context()
    assert asyncio.run(servicer.GetModel(b"\xff", context)) == messages.ModelInfo()
    assert context.code == INVALID


def test_text_to_tokens_and_back(servicer: Servicer) -> None:
    answer, _ = ask(servicer.Tokenize, messages.TokenizeRequest(text="春风"))
    assert answer == messages.TokenizeResponse(token_ids=tokens_of("春风"), tokens=["春", "风"])
    back, _ = ask(servicer.Detokenize, messages.DetokenizeRequest(token_ids=answer.token_ids))
    assert back.text == "春风"
    nothing, context = ask(servicer.Tokenize, messages.TokenizeRequest())
    assert (nothing, context.code) == (messages.TokenizeResponse(), None)


def test_continuations_are_scored(servicer: Servicer) -> None:
    asked = messages.ScoreRequest(prompt="春风", continuations=["又绿", "的的"])
    answer, context = ask(servicer.Score, asked)
    assert context.code is None
    assert list(answer.scores) == [
        messages.Scored(token_ids=tokens_of("又绿"), logprobs=[-1, -1.5], logprob=-2.5),
        messages.Scored(
            token_ids=tokens_of("的的"), logprobs=[-1, -1.5], logprob=-2.5, greedy=True
        ),
    ]


def test_aborting_ends_a_text_with_what_there_is(servicer: Servicer, engine: Any) -> None:
    async def abort() -> list[messages.GenerateChunk]:
        chunks = []
        data = request(max_new_tokens=10**9, n=2, request_id="mine")
        async for chunk in servicer.GenerateStream(data, Context()):
            if len(chunks) == 5:
                message = messages.AbortRequest(request_id="mine")
                assert await servicer.Abort(message.SerializeToString(), Context())
            chunks.append(chunk)
        return chunks

    chunks = asyncio.run(abort())
    finishes = {chunk.index: chunk.finish for chunk in chunks if chunk.HasField("finish")}
    assert [finishes[index].reason for index in (0, 1)] == [messages.FINISH_REASON_ABORT] * 2
    for index in (0, 1):
        tokens = sum(len(chunk.token_ids) for chunk in chunks if chunk.index == index)
        assert finishes[index].completion_tokens == tokens >= 2
    assert not engine.has_work


def test_aborting_what_does_not_run_is_not_found(servicer: Servicer) -> None:
    unary(servicer, request(max_new_tokens=1, request_id="mine"))
    _, context = ask(servicer.Abort, messages.AbortRequest(request_id="mine"))
    assert context.code == grpc.StatusCode.NOT_FOUND
    assert "no request 'mine' is running; it may have ended" in context.details


def test_the_registered_service_hands_over_bytes_and_takes_messages() -> None:
    """What proxy.add_services registers serves the generated clients."""
    drained = []

    async def drain(request: DrainRequest) -> DrainResponse:
        drained.append(request)
        return DrainResponse()

    class Echo(Servicer, ControlServicer):
        operations = SimpleNamespace(drain=drain)  # type: ignore[assignment]

        async def Generate(self, request: bytes, context: object) -> Message:
            return messages.GenerateResponse(text=repr(type(request)))

        async def GenerateStream(self, request: bytes, context: object) -> AsyncIterator[Message]:
            for part in messages.GenerateRequest.FromString(request).prompt:
                yield messages.GenerateChunk(text=part)

        async def GetModel(self, request: bytes, context: object) -> Message:
            return messages.ModelInfo(name="echo")

    async def call(use: Callable[[Any], Any]) -> Any:
        server = grpc.aio.server()
        add_services(Echo(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            result = await use(channel)
        await server.stop(None)
        return result

    async def use(channel: Any) -> tuple[str, list[str], str]:
        stub, control = services.GenerationStub(channel), ClusterControlStub(channel)
        await control.Drain(control_pb2.DrainRequest(within_s=5), timeout=5)
        ask = messages.GenerateRequest(prompt="春风")
        unary = await stub.Generate(ask, timeout=5)
        parts = [chunk.text async for chunk in stub.GenerateStream(ask, timeout=5)]
        return unary.text, parts, (await stub.GetModel(messages.GetModelRequest())).name

    assert asyncio.run(call(use)) == ("<class 'bytes'>", ["春", "风"], "echo")
    assert drained == [DrainRequest(within_s=5)]
