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


def test_unary_answers_with_the_continuation(servicer: Servicer) -> None:
    response, context = unary(servicer, request(max_new_tokens=3, request_id="mine"))
    assert context.code is None
    assert response == messages.GenerateResponse(
        text="一二三",
        token_ids=[ord(character) for character in "一二三"],
        finish_reason=messages.FINISH_REASON_LENGTH,
        prompt_tokens=2,
        completion_tokens=3,
        request_id="mine",
    )


def test_streamed_chunks_joined_are_the_unary_answer(servicer: Servicer) -> None:
    data = request(max_new_tokens=5, request_id="mine")
    response, _ = unary(servicer, data)
    chunks, _ = streamed(servicer, data)
    assert "".join(chunk.text for chunk in chunks) == response.text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(response.token_ids)
    assert [chunk.HasField("header") for chunk in chunks] == [True, False, False, False, False]
    assert [chunk.HasField("finish") for chunk in chunks] == [False, False, False, False, True]
    assert chunks[0].header == messages.StreamHeader(
        request_id="mine", prompt_tokens=2, model="poems"
    )
    assert chunks[-1].finish == messages.StreamFinish(
        reason=messages.FINISH_REASON_LENGTH, completion_tokens=5
    )


def test_a_stream_of_one_token_has_header_and_finish_in_one_chunk(servicer: Servicer) -> None:
    (chunk,), _ = streamed(servicer, request(max_new_tokens=1))
    assert chunk.HasField("header")
    assert chunk.HasField("finish")
    assert chunk.header.request_id, "the server names what the caller did not"


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


def test_the_model_describes_itself(servicer: Servicer) -> None:
    context = Context()
    info = asyncio.run(servicer.GetModel(b"", context))
    assert info == messages.ModelInfo(
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
    assert asyncio.run(servicer.GetModel(b"\xff", context)) == messages.ModelInfo()
    assert context.code == INVALID


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

    assert len(asyncio.run(drain_between())) == 5
    for call in (unary, streamed):
        _, context = call(servicer, request())
        assert context.code == grpc.StatusCode.UNAVAILABLE
        assert "poems takes no new requests" in context.details
