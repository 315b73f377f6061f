"""The client against a server of its own process: what is sent, what comes back, what is raised."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from cluster.client import AsyncClient, Chunk, Client, Generation, GenerationError, Model
from cluster.remote import watch
from protos import control_pb2
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services

from .conftest import SERVED, ControlServer

SAMPLING: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 5,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "seed": 7,
    "max_new_tokens": 3,
    "stop": ["。"],
    "request_id": "mine",
}
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
        self.requests: list[messages.GenerateRequest] = []
        self.metadata: dict[str, str] = {}
        self.left = threading.Event()

    def Generate(self, request: messages.GenerateRequest, context: Any) -> Any:
        self.requests.append(request)
        if request.prompt == "bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "top_k must be at least 0; found -1")
        return messages.GenerateResponse(
            text="一二三",
            token_ids=[1, 2, 3],
            finish_reason=messages.FINISH_REASON_STOP,
            prompt_tokens=2,
            completion_tokens=3,
            request_id=request.request_id,
        )

    def GenerateStream(self, request: messages.GenerateRequest, context: Any) -> Iterator[Any]:
        self.requests.append(request)
        context.add_callback(self.left.set)
        header = messages.StreamHeader(request_id="mine", prompt_tokens=2, model="poems")
        yield messages.GenerateChunk(text="一", token_ids=[1], header=header)
        if request.prompt == "bad":
            context.abort(grpc.StatusCode.UNAVAILABLE, "the engine has stopped")
        while request.prompt == "endless" and context.is_active():
            yield messages.GenerateChunk(text="一", token_ids=[1])
        finish = messages.StreamFinish(reason=messages.FINISH_REASON_LENGTH, completion_tokens=3)
        yield messages.GenerateChunk(text="二三", token_ids=[2, 3], finish=finish)

    def GetModel(self, request: messages.GetModelRequest, context: Any) -> Any:
        self.metadata = dict(context.invocation_metadata())
        fields = {name: getattr(MODEL, name) for name in Model.__dataclass_fields__}
        return messages.ModelInfo(**fields)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def target(server: Server) -> Iterator[str]:
    running = grpc.server(futures.ThreadPoolExecutor(4))
    services.add_GenerationServicer_to_server(server, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(None).wait(5)


class Blocking:
    """AsyncClient with Client's face, so that one test covers both."""

    def __init__(self, target: str, **options: Any) -> None:
        self._target, self._options = target, options

    def generate(self, prompt: str, **sampling: Any) -> Any:
        return self._run(lambda client: client.generate(prompt, **sampling))

    def model(self) -> Any:
        return self._run(lambda client: client.model())

    def stream(self, prompt: str, **sampling: Any) -> list[Chunk]:
        async def collect(client: AsyncClient) -> list[Chunk]:
            return [chunk async for chunk in client.stream(prompt, **sampling)]

        return self._run(collect)

    def _run(self, use: Callable[[AsyncClient], Any]) -> Any:
        async def run() -> Any:
            async with AsyncClient(self._target, **self._options) as client:
                return await use(client)

        return asyncio.run(run())


@pytest.fixture(params=[Client, Blocking])
def connect(request: pytest.FixtureRequest, target: str) -> Iterator[Callable[..., Any]]:
    clients = []

    def connect(**options: Any) -> Any:
        clients.append(request.param(target, timeout_s=10, **options))
        return clients[-1]

    yield connect
    for client in clients:
        if isinstance(client, Client):
            client.close()


def test_generate_sends_what_was_asked(connect: Any, server: Server) -> None:
    answer = connect().generate("春风", **SAMPLING)
    assert answer == Generation(
        text="一二三",
        token_ids=(1, 2, 3),
        finish_reason="stop",
        prompt_tokens=2,
        completion_tokens=3,
        request_id="mine",
    )
    assert server.requests == [messages.GenerateRequest(prompt="春风", **SAMPLING)]


def test_what_was_not_asked_is_not_sent(connect: Any, server: Server) -> None:
    connect().generate("春风")
    assert server.requests == [messages.GenerateRequest(prompt="春风")]


def test_a_stream_brings_chunks(connect: Any) -> None:
    shared = {"prompt_tokens": 2, "request_id": "mine"}
    assert list(connect().stream("春风", **SAMPLING)) == [
        Chunk(text="一", token_ids=(1,), finish_reason="", **shared),
        Chunk(text="二三", token_ids=(2, 3), finish_reason="length", **shared),
    ]


def test_the_model(connect: Any, server: Server) -> None:
    assert connect().model() == MODEL
    assert "application" not in server.metadata


def test_the_application_is_sent_as_metadata(connect: Any, server: Server) -> None:
    connect(application="poems").model()
    assert server.metadata["application"] == "poems"


def test_a_refusal_is_raised_with_code_and_sentence(connect: Any) -> None:
    with pytest.raises(GenerationError) as error:
        connect().generate("bad")
    assert error.value.code == "INVALID_ARGUMENT"
    assert str(error.value) == "INVALID_ARGUMENT: top_k must be at least 0; found -1"


def test_a_stream_that_breaks_raises(connect: Any) -> None:
    with pytest.raises(GenerationError, match="UNAVAILABLE: the engine has stopped"):
        list(connect().stream("bad"))


@pytest.mark.parametrize(
    "sampling",
    [{"top_k": "five"}, {"top_k": 2**40}, {"seed": 1.5}, {"stop": [1]}, {"request_id": "\ud800"}],
)
def test_what_cannot_be_sent_is_an_invalid_argument(connect: Any, sampling: Any) -> None:
    for call in (connect().generate, lambda *a, **k: list(connect().stream(*a, **k))):
        with pytest.raises(GenerationError, match="INVALID_ARGUMENT"):
            call("春风", **sampling)


def test_nobody_answers() -> None:
    with (
        Client("127.0.0.1:1", timeout_s=10) as client,
        pytest.raises(GenerationError, match="UNAVAILABLE"),
    ):
        client.model()


def test_leaving_a_stream_cancels_it(target: str, server: Server) -> None:
    with Client(target, timeout_s=10) as client:
        stream = client.stream("endless")
        next(stream)
        stream.close()
        assert server.left.wait(5)


def test_leaving_an_async_stream_cancels_it(target: str, server: Server) -> None:
    async def leave() -> None:
        async with AsyncClient(target, timeout_s=10) as client:
            stream = client.stream("endless")
            await anext(stream)
            await stream.aclose()
            assert await asyncio.to_thread(server.left.wait, 5)

    asyncio.run(leave())


def test_an_operator_is_answered(served_at: str, control: ControlServer) -> None:
    with Client(served_at, timeout_s=10) as client:
        assert client.topology() == SERVED
        client.drain()
        client.drain(resume=True, within_s=2.5)
        assert client.refresh("/runs/b", restart=True) == 5
        client.scale(3, within_s=9)
    assert control.requests == [
        control_pb2.ControlQuery(),
        control_pb2.DrainRequest(),
        control_pb2.DrainRequest(resume=True, within_s=2.5),
        control_pb2.RefreshRequest(checkpoint="/runs/b", restart=True),
        control_pb2.ScaleRequest(replicas=3, within_s=9),
    ]


def test_an_operator_is_refused_with_code_and_sentence(
    served_at: str, control: ControlServer
) -> None:
    control.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "it scales itself")
    with Client(served_at, timeout_s=10) as client:
        with pytest.raises(GenerationError, match="FAILED_PRECONDITION: it scales itself"):
            client.scale(2)
        with pytest.raises(GenerationError, match="FAILED_PRECONDITION"):
            next(client.watch_topology())
        with pytest.raises(GenerationError, match="INVALID_ARGUMENT"):
            client.scale(-1)  # never sent


def test_leaving_a_watch_ends_it_on_the_server(served_at: str, control: ControlServer) -> None:
    with Client(served_at, timeout_s=10) as client:
        watch = client.watch_topology(every_s=0.5)
        assert [next(watch) for _ in range(3)] == [SERVED] * 3
        watch.close()
        assert control.left.wait(5)
    assert control.requests == [control_pb2.ControlQuery(every_s=0.5)]


def test_a_watch_asks_another_replica_when_its_own_ends(
    served_at: str, control: ControlServer
) -> None:
    control.breaks_after = 2
    with Client(served_at, timeout_s=10) as client:
        answers = watch(client, 0.5)
        assert [next(answers) for _ in range(4)] == [SERVED] * 4
        assert len(control.requests) == 2
        control.refusal = (grpc.StatusCode.UNAVAILABLE, "all are gone")
        control.breaks_after = 1
        with pytest.raises(GenerationError, match="all are gone"):
            list(watch(client, 0.5))


def test_the_client_needs_grpc_and_protos_only() -> None:
    script = (
        "import sys, cluster.client; "
        "print([name for name in ('ray', 'torch', 'numpy', 'gptmoe') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
