"""The edge, without Ray: real gRPC channels to a real server, replicas that are none."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

from gptmoe.errors import (
    AlreadyRunning,
    ClusterError,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    RequestError,
    Unavailable,
)
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services
from serve.config import EdgeConfig
from serve.edge.backend import Replicas
from serve.edge.server import EdgeServer
from serve.keys import Keys
from tests.fake_replicas import POEM, Handle, Poet

Stub = Any


@asynccontextmanager
async def edge(handle: Handle, keys: Keys | None = None, **config: Any) -> AsyncIterator[str]:
    """A running edge's address."""
    server = EdgeServer(Replicas(handle), EdgeConfig(port=0, **config), keys)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def ask(handle: Handle, use: Callable[[Stub], Awaitable[Any]], **config: Any) -> Any:
    """What `use` gets of an edge in front of `handle`."""

    async def run() -> Any:
        async with edge(handle, **config) as target, grpc.aio.insecure_channel(target) as channel:
            return await asyncio.wait_for(use(services.GenerationStub(channel)), 20)

    return asyncio.run(run())


def request(**fields: Any) -> messages.GenerateRequest:
    return messages.GenerateRequest(prompt="静夜", **fields)


async def streamed(stub: Stub, **fields: Any) -> list[messages.GenerateChunk]:
    return [chunk async for chunk in stub.GenerateStream(request(**fields))]


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def details(call: Any) -> list[Any]:
    """The rich details that a call ends with."""
    status = await rpc_status.aio.from_call(call)
    found = []
    for packed in status.details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
        found.append(kind.FromString(packed.value))
    return found


def test_answers_pass_as_they_are() -> None:
    poet = Poet()

    async def use(stub: Stub) -> None:
        answer = await stub.Generate(request(request_id="mine"))
        assert answer.text == POEM
        chunks = await streamed(stub, request_id="mine")
        assert "".join(chunk.text for chunk in chunks) == POEM
        assert bytes(token for chunk in chunks for token in chunk.token_ids).decode() == POEM
        assert chunks[0].header.request_id == "mine"
        assert chunks[-1].finish.completion_tokens == len(POEM.encode())

    ask(Handle(poet), use)
    sent = request(request_id="mine").SerializeToString()
    assert poet.asked == [("Generate", sent), ("GenerateStream", sent)]


def test_a_request_without_a_name_gets_one() -> None:
    poet = Poet()

    async def use(stub: Stub) -> str:
        return (await streamed(stub))[0].header.request_id

    name = ask(Handle(poet), use)
    assert messages.GenerateRequest.FromString(poet.asked[0][1]) == request(request_id=name)
    assert len(name) == 32


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("top_p must be above 0", "top_p"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound("no model of that name"), grpc.StatusCode.NOT_FOUND),
        (AlreadyRunning("a runs already"), grpc.StatusCode.ALREADY_EXISTS),
        (Overloaded("the queue is full", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("a shard is away", 3.5), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceeded("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_errors_are_statuses_with_details(error: Any, code: grpc.StatusCode) -> None:
    async def use(stub: Stub) -> None:
        for call in (
            stub.Generate(request(request_id="mine")),
            stub.GenerateStream(request(request_id="mine")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as found:
                await (call if hasattr(call, "__await__") else call.read())
            assert (found.value.code(), found.value.details()) == (code, str(error))
            kinds = {type(detail).__name__: detail for detail in await details(call)}
            assert kinds.pop("RequestInfo").request_id == "mine"
            if isinstance(error, RequestError):
                (violation,) = kinds.pop("BadRequest").field_violations
                assert (violation.field, violation.description) == ("top_p", str(error))
            if isinstance(error, Overloaded | Unavailable):
                delay = kinds.pop("RetryInfo").retry_delay
                assert delay.ToTimedelta().total_seconds() == error.retry_after_s
            assert not kinds

    ask(Handle(Poet(error=error)), use)


def test_a_bug_is_internal_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def use(stub: Stub) -> None:
        error = await refusal(stub.Generate(request()))
        assert error.code() == grpc.StatusCode.INTERNAL
        assert error.details() == "the server failed on this request; its log says why"

    ask(Handle(Poet(error=ZeroDivisionError("a bug"))), use)
    assert "a request failed" in caplog.text


def test_a_message_that_is_too_large_is_refused() -> None:
    poet = Poet()

    async def use(stub: Stub) -> None:
        error = await refusal(stub.Generate(messages.GenerateRequest(prompt="静" * 2000)))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Generate(request())).text == POEM

    ask(Handle(poet), use, max_request_bytes=4096)
    assert len(poet.asked) == 1


# --- leaving, and deadlines ------------------------------------------------------------------


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def test_leaving_cancels_the_replicas_work() -> None:
    poet = Poet(hangs=True)
    handle = Handle(poet)

    async def use(stub: Stub) -> None:
        stream = stub.GenerateStream(request())
        assert (await stream.read()).header.model == "poems"
        stream.cancel()
        await wait_until(lambda: poet.cancelled == 1)
        call = stub.Generate(request())
        await wait_until(lambda: len(poet.asked) == 2)
        call.cancel()
        await wait_until(lambda: poet.cancelled == 2)

    ask(handle, use)
    assert handle.cancels == 2


def test_a_stream_that_ends_well_is_not_cancelled() -> None:
    handle = Handle(Poet())
    ask(handle, streamed)
    assert handle.cancels == 0


def test_a_calls_deadline_reaches_the_replica_and_ends_it() -> None:
    poet = Poet(hangs=True)

    async def use(stub: Stub) -> None:
        error = await refusal(stub.Generate(request(), timeout=0.3))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await wait_until(lambda: poet.cancelled == 1)

    ask(Handle(poet), use)
    (asked,) = poet.asked
    assert 0 < messages.GenerateRequest.FromString(asked[1]).deadline_ms <= 300


def test_a_requests_own_deadline_is_kept_though_the_replica_does_not() -> None:
    poet = Poet(hangs=True)

    async def use(stub: Stub) -> None:
        for call in (
            stub.Generate(request(deadline_ms=200), timeout=10),
            stub.GenerateStream(request(deadline_ms=200), timeout=10),
        ):
            streams = isinstance(call, grpc.aio.UnaryStreamCall)
            error = await refusal(drain(call) if streams else call)
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert error.details() == "the deadline has passed before the answer was complete"
        await wait_until(lambda: poet.cancelled == 2)

    ask(Handle(poet), use)
    assert [messages.GenerateRequest.FromString(data).deadline_ms for _, data in poet.asked] == [
        200,
        200,
    ]


async def drain(call: Any) -> list[Any]:
    return [chunk async for chunk in call]


# --- replicas that die -----------------------------------------------------------------------


@pytest.mark.parametrize("counts_all", [False, True])
@pytest.mark.parametrize("finish_apart", [False, True])
@pytest.mark.parametrize("dies_after", range(1, 12))
def test_a_stream_goes_on_where_its_replica_died(
    dies_after: int, finish_apart: bool, counts_all: bool
) -> None:
    """36 byte tokens in chunks of 4: most of them end inside a character."""
    kinds = {"finish_apart": finish_apart, "counts_all": counts_all}
    dying, living = Poet(dies_after=dies_after, **kinds), Poet(tokens_a_chunk=5, **kinds)

    async def use(stub: Stub) -> None:
        chunks = await streamed(stub, request_id="mine", logprobs=True, prompt_logprobs=True)
        assert "".join(chunk.text for chunk in chunks) == POEM
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert bytes(tokens).decode() == POEM
        logprobs = [value for chunk in chunks for value in chunk.logprobs]
        assert logprobs == [-token / 256 for token in tokens]
        assert [value for chunk in chunks for value in chunk.prompt_logprobs] == [-1.0]
        assert [chunk.HasField("header") for chunk in chunks].count(True) == 1
        assert chunks[0].header.request_id == "mine"
        assert [chunk.HasField("finish") for chunk in chunks].count(True) == 1
        finish = chunks[-1].finish
        assert finish.completion_tokens == len(tokens)
        if living.asked:
            assert finish.cumulative_logprob == pytest.approx(sum(logprobs))
            assert finish.timings.total_s >= finish.timings.first_token_s > 0

    ask(Handle(dying, living), use)
    whole = 10 + finish_apart  # a header, nine chunks, and perhaps a finish
    assert bool(living.asked) == (dies_after < whole)


def test_one_replica_after_the_other_dies_and_the_text_goes_on() -> None:
    poets = [Poet(dies_after=3), Poet(dies_after=0), Poet(dies_after=2), Poet()]

    async def use(stub: Stub) -> str:
        return "".join(chunk.text for chunk in await streamed(stub))

    assert ask(Handle(*poets), use, tries=4) == POEM
    resumed = [messages.GenerateRequest.FromString(poet.asked[0][1]) for poet in poets]
    assert [len(one.resume_token_ids) for one in resumed] == [0, 4, 4, 4]
    assert len({one.request_id for one in resumed}) == 1


def test_tokens_of_the_callers_own_resuming_stay_in_front() -> None:
    poem = list(POEM.encode())
    dying, living = Poet(dies_after=3), Poet()

    async def use(stub: Stub) -> str:
        return "".join([chunk.text for chunk in await streamed(stub, resume_token_ids=poem[:6])])

    assert ask(Handle(dying, living), use) == POEM[2:]
    asked = messages.GenerateRequest.FromString(living.asked[0][1])
    assert list(asked.resume_token_ids) == poem[:10]


def test_tries_are_bounded() -> None:
    poets = [Poet(dies_after=2) for _ in range(5)]

    async def use(stub: Stub) -> None:
        call = stub.GenerateStream(request())
        error = await refusal(drain(call))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "is gone" in error.details()
        assert error_details_pb2.RetryInfo in map(type, await details(call))

    ask(Handle(*poets), use, tries=2)
    assert sum(len(poet.asked) for poet in poets) == 2


@pytest.mark.parametrize("fields", [{"n": 2}, {"num_beams": 2, "temperature": 0}])
def test_several_answers_do_not_go_on(fields: dict[str, Any]) -> None:
    poets = [Poet(dies_after=2), Poet()]

    async def use(stub: Stub) -> None:
        call = stub.GenerateStream(request(**fields))
        error = await refusal(drain(call))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error_details_pb2.RetryInfo in map(type, await details(call))

    ask(Handle(*poets), use)


def test_several_answers_that_have_not_begun_are_asked_for_again() -> None:
    async def use(stub: Stub) -> int:
        return len(await streamed(stub, n=2))

    assert ask(Handle(Poet(dies_after=0), Poet()), use) == 10


def test_other_weights_do_not_go_on_with_the_text() -> None:
    async def use(stub: Stub) -> None:
        error = await refusal(streamed(stub))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "their weights have changed" in error.details()

    other = Poet(poem=POEM[:1] + "夜思是唐代诗人李白")
    ask(Handle(Poet(dies_after=3, tokens_a_chunk=3), other), use, tries=2)


def test_a_replica_that_still_knows_the_id_is_waited_for() -> None:
    poets = [Poet(dies_after=3), Poet(error=AlreadyRunning("mine runs already")), Poet()]

    async def use(stub: Stub) -> str:
        return "".join(chunk.text for chunk in await streamed(stub, request_id="mine"))

    assert ask(Handle(*poets), use) == POEM


def test_a_shard_that_is_away_in_mid_stream_is_waited_for() -> None:
    class Stumbling(Poet):
        async def edge_stream(self, method: str, data: bytes) -> AsyncIterator[bytes]:
            count = 0
            async for chunk in super().edge_stream(method, data):
                yield chunk
                count += 1
                if count == 3 and len(self.asked) == 1:
                    raise Unavailable("a shard is away", 0.01)

    async def use(stub: Stub) -> str:
        return "".join(chunk.text for chunk in await streamed(stub))

    assert ask(Handle(Stumbling()), use) == POEM


def test_nobody_takes_over_in_time() -> None:
    class Busy(Poet):
        async def edge_stream(self, method: str, data: bytes) -> AsyncIterator[bytes]:
            await self._for_ever()
            yield b""

    busy = Busy()

    async def use(stub: Stub) -> None:
        error = await refusal(streamed(stub))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "no other replica took the request over in 0.2 s" in error.details()

    ask(Handle(Poet(dies_after=3), busy), use, tries=2, resume_s=0.2)
    assert busy.cancelled == 1


@pytest.mark.parametrize("ending", [{"dies_after": 0}, {"error": ClusterError("engine stopped")}])
def test_a_whole_answer_is_asked_for_again(ending: dict[str, Any]) -> None:
    poets = [Poet(**ending), Poet(**ending), Poet()]

    async def use(stub: Stub) -> str:
        return str((await stub.Generate(request(seed=7))).text)

    assert ask(Handle(*poets), use) == POEM
    assert len({poet.asked[0] for poet in poets}) == 1, "the same request each time"

    async def give_up(stub: Stub) -> None:
        error = await refusal(stub.Generate(request()))
        assert error.code() == grpc.StatusCode.UNAVAILABLE

    ask(Handle(*poets), give_up, tries=2)


def test_what_operators_ask_is_not_asked_twice() -> None:
    poets = [Poet(dies_after=0), Poet()]

    async def run() -> None:
        async with edge(Handle(*poets)) as target, grpc.aio.insecure_channel(target) as channel:
            for method, call in (
                ("Refresh", channel.unary_unary("/gptmoe.v1.ClusterControl/Refresh")),
                ("Drain", channel.unary_unary("/gptmoe.v1.ClusterControl/Drain")),
            ):
                error = await refusal(call(b"", timeout=5))
                assert error.code() == grpc.StatusCode.UNAVAILABLE, method
                poets.append(poets.pop(0))
                poets[0].dies_after = 0

    asyncio.run(run())


# --- anything at all -------------------------------------------------------------------------


def test_bytes_that_are_no_message_reach_the_replica_unchanged() -> None:
    poet = Poet(error=RequestError("the request is not a GenerateRequest", "prompt"))

    async def run() -> None:
        async with edge(Handle(poet)) as target, grpc.aio.insecure_channel(target) as channel:
            call = channel.unary_unary("/gptmoe.v1.Generation/Generate")
            error = await refusal(call(b"\xff\xff\xff", timeout=5))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(run())
    assert poet.asked == [("Generate", b"\xff\xff\xff")]


@settings(max_examples=30)
@given(blobs=st.lists(st.binary(max_size=40) | st.just(os.urandom(64)), max_size=20))
def test_no_bytes_break_the_edge(blobs: list[bytes]) -> None:
    async def run() -> None:
        async with edge(Handle(Poet())) as target, grpc.aio.insecure_channel(target) as channel:
            for method in ("Generate", "Score", "Tokenize", "Abort"):
                call = channel.unary_unary(f"/gptmoe.v1.Generation/{method}")
                for blob in blobs:
                    assert (await call(blob, timeout=5)) == messages.GenerateResponse(
                        text=POEM
                    ).SerializeToString()
            error = await refusal(channel.unary_unary("/gptmoe.v1.Generation/Nothing")(b""))
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(run())
