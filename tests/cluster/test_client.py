"""The client against a server of its own process: what is sent, what comes back, what is raised."""

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from cluster.client import (
    AsyncClient,
    Choice,
    Chunk,
    Client,
    Generation,
    GenerationError,
    Sampling,
    Scored,
    Timings,
    Tokens,
)
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services

from .generation_server import MODEL, SAMPLING, TIMES, Server


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

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self._run(
            lambda client: getattr(client, name)(*given, **named)
        )

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
    first = Choice(
        index=0,
        text="一",
        token_ids=(1,),
        finish_reason="stop",
        logprobs=(-0.5,),
        top_logprobs=(((1, -0.5), (4, -2.0)),),
        cumulative_logprob=-0.5,
    )
    second = Choice(index=1, text="二三", token_ids=(2, 3), finish_reason="abort")
    assert answer == Generation(
        text="一",
        token_ids=(1,),
        finish_reason="stop",
        prompt_tokens=2,
        completion_tokens=3,
        request_id="mine",
        logprobs=(-0.5,),
        weights_version=4,
        choices=(first, second),
        prompt_logprobs=(-1.5,),
        timings=Timings(**TIMES),
        cached_tokens=1,
        model="poems",
    )
    assert server.requests == [messages.GenerateRequest(prompt="春风", **SAMPLING)]


def test_everything_that_a_request_holds_can_be_asked_for() -> None:
    fields = {field.name for field in messages.GenerateRequest.DESCRIPTOR.fields}
    assert set(SAMPLING) == set(Sampling.__annotations__) == fields - {"prompt", "prompt_token_ids"}


def test_what_was_not_asked_is_not_sent(connect: Any, server: Server) -> None:
    connect().generate("春风")
    assert server.requests == [messages.GenerateRequest(prompt="春风")]


def test_a_prompt_can_be_tokens(connect: Any, server: Server) -> None:
    connect().generate([5, 6], seed=1)
    list(connect().stream((5, 6), seed=1))
    assert server.requests == [messages.GenerateRequest(prompt_token_ids=[5, 6], seed=1)] * 2


def test_a_stream_brings_chunks(connect: Any, server: Server) -> None:
    shared = {"prompt_tokens": 2, "request_id": "mine", "model": "poems"}
    assert list(connect().stream("春风", **SAMPLING)) == [  # no chunk of the header alone
        Chunk(
            text="一",
            token_ids=(1,),
            finish_reason="",
            logprobs=(-0.5,),
            top_logprobs=(((1, -0.5), (4, -2.0)),),
            prompt_logprobs=(-1.5,),
            **shared,
        ),
        Chunk(
            text="二三",
            token_ids=(2, 3),
            finish_reason="length",
            index=1,
            completion_tokens=3,
            weights_version=4,
            timings=Timings(**TIMES),
            cached_tokens=1,
            cumulative_logprob=-0.5,
            **shared,
        ),
    ]
    assert server.requests == [messages.GenerateRequest(prompt="春风", **SAMPLING)]


def test_continuations_are_scored(connect: Any, server: Server) -> None:
    options: dict[str, Any] = {"model": "poems", "deadline_ms": 50, "priority": 2}
    assert connect().score("春", ["风", "雨"], **options) == (
        Scored(token_ids=(1, 2), logprobs=(-0.5, -1.5), logprob=-2.0, greedy=True),
    )
    asked = messages.ScoreRequest(prompt="春", continuations=["风", "雨"], **options)
    assert server.requests == [asked]


def test_text_to_tokens_and_back(connect: Any, server: Server) -> None:
    assert connect().tokenize("春风") == Tokens(token_ids=(1, 2), texts=("春", "\ufffd"))
    assert connect().detokenize([1, 2]) == "春风"
    assert server.requests == [
        messages.TokenizeRequest(text="春风"),
        messages.DetokenizeRequest(token_ids=[1, 2]),
    ]


def test_a_request_is_aborted(connect: Any, server: Server) -> None:
    connect().abort("mine")
    assert server.requests == [messages.AbortRequest(request_id="mine")]
    with pytest.raises(GenerationError, match="NOT_FOUND: no request 'gone' is running"):
        connect().abort("gone")


def test_the_model(connect: Any, server: Server) -> None:
    assert connect().model() == MODEL
    assert connect().model("poems") == MODEL
    assert [request.model for request in server.requests] == ["", "poems"]
    assert "application" not in server.metadata
    assert connect().models() == (MODEL, MODEL)


def test_the_application_is_sent_as_metadata(connect: Any, server: Server) -> None:
    connect(application="poems").model()
    assert server.metadata["application"] == "poems"


def test_a_refusal_is_raised_with_code_and_sentence(connect: Any) -> None:
    with pytest.raises(GenerationError) as error:
        connect().generate("bad")
    assert error.value.code == "INVALID_ARGUMENT"
    assert str(error.value) == "INVALID_ARGUMENT: top_k must be at least 0; found -1"


@pytest.mark.parametrize(
    ("said", "wait_s"), [("2300", 2.3), ("0", 0.0), ("-1", None), ("soon", None), (None, None)]
)
def test_a_refusal_says_when_to_come_again(
    connect: Any, server: Server, said: str | None, wait_s: float | None
) -> None:
    server.pushback = said
    for ask in (lambda: connect().generate("full"), lambda: list(connect().stream("full"))):
        with pytest.raises(GenerationError, match="RESOURCE_EXHAUSTED") as error:
            ask()
        assert error.value.retry_after_s == wait_s
        assert pickle.loads(pickle.dumps(error.value)).retry_after_s == wait_s


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


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("generate", (["春"],)),
        ("score", ("春", [1])),
        ("score", (7, ["风"])),
        ("tokenize", ("\ud800",)),
        ("detokenize", ([2**40],)),
        ("abort", (7,)),
        ("model", (7,)),
    ],
)
def test_what_cannot_be_said_is_an_invalid_argument(
    connect: Any, method: str, given: tuple[Any, ...]
) -> None:
    with pytest.raises(GenerationError, match="INVALID_ARGUMENT"):
        getattr(connect(), method)(*given)


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


def test_the_client_needs_grpc_and_protos_only() -> None:
    script = (
        "import sys, cluster.client; "
        "print([name for name in ('ray', 'torch', 'numpy', 'gptmoe') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
