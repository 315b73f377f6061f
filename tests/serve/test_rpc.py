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
from gptmoe.errors import CheckpointError, GptMoeError
from protos import control_pb2
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services
from protos.control_pb2_grpc import ClusterControlStub
from serve.control import ControlServicer
from serve.proxy import add_services
from serve.rpc import Servicer
from serve.service import Service

from .full_engine import CACHED, FullEngine

INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Context:
    """Ray Serve's grpc_context, as far as the methods use it."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


@pytest.fixture
def engine() -> FullEngine:
    return FullEngine()


@pytest.fixture
def servicer(service: Service) -> Servicer:
    servicer = Servicer()
    servicer.service = service
    return servicer


def request(prompt: str = "春风", **fields: Any) -> bytes:
    return messages.GenerateRequest(prompt=prompt, **fields).SerializeToString()


def unary(servicer: Servicer, data: bytes) -> tuple[messages.GenerateResponse, Context]:
    context = Context()
    return asyncio.run(servicer.Generate(data, context)), context


def streamed(servicer: Servicer, data: bytes) -> tuple[list[messages.GenerateChunk], Context]:
    context = Context()

    async def collect() -> list[messages.GenerateChunk]:
        chunks = []
        try:
            async for chunk in servicer.GenerateStream(data, context):
                chunks.append(chunk)
        except GptMoeError:
            assert context.code is not None, "a status comes before an error"
        return chunks

    return asyncio.run(collect()), context


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
        (request(priority=101), "priority must be between -100 and 100; found 101"),
        (request(deadline_ms=-1), "deadline_ms must be at least 0 (0 = none); found -1"),
        (request(request_id="春" * 201), "request_id must be at most 200 characters"),
        (b"\x0a\x02\xff\xfe", "not a gptmoe.v1.GenerateRequest with UTF-8 text"),
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


def ask(method: Any, message: Message) -> tuple[Any, Context]:
    """A unary method's answer."""
    context = Context()
    return asyncio.run(method(message.SerializeToString(), context)), context


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


def test_text_to_tokens_and_back(servicer: Servicer) -> None:
    answer, _ = ask(servicer.Tokenize, messages.TokenizeRequest(text="春风"))
    assert answer == messages.TokenizeResponse(token_ids=tokens_of("春风"), tokens=["春", "风"])
    back, _ = ask(servicer.Detokenize, messages.DetokenizeRequest(token_ids=answer.token_ids))
    assert back.text == "春风"
    nothing, context = ask(servicer.Tokenize, messages.TokenizeRequest())
    assert (nothing, context.code) == (messages.TokenizeResponse(), None)


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
            "priority must be between -100 and 100; found -101",
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


def test_a_drained_model_is_unavailable_and_running_texts_go_on(
    servicer: Servicer, service: Service
) -> None:
    async def drain_between() -> list[messages.GenerateChunk]:
        chunks = []
        async for chunk in servicer.GenerateStream(request(max_new_tokens=5), Context()):
            service.draining = True
            chunks.append(chunk)
        return chunks

    assert len(asyncio.run(drain_between())) == 1 + 5  # the header
    for call in (unary, streamed):
        _, context = call(servicer, request())
        assert context.code == grpc.StatusCode.UNAVAILABLE
        assert "poems takes no new requests" in context.details
