"""The edge, without Ray: what passes, errors as statuses, leaving, deadlines, any bytes at all."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import answers
from gptmoe.errors import (
    AlreadyRunning,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    RequestError,
    Unavailable,
)
from protos import generation_pb2 as messages
from serve.edge.inlet import Answer
from serve.names import Ticket
from tests.edge_calls import (
    Stub,
    ask,
    details,
    drain,
    edge,
    refusal,
    request,
    streamed,
    wait_until,
)
from tests.fake_replicas import POEM, Handle, Poet


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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("top_p must be above 0", "top_p"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound("no model of that name"), grpc.StatusCode.NOT_FOUND),
        (AlreadyRunning("a runs already"), grpc.StatusCode.ALREADY_EXISTS),
        (Overloaded("the queue is full", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("a shard is away", 3.5), grpc.StatusCode.UNAVAILABLE),
        (Unavailable("drained", None), grpc.StatusCode.UNAVAILABLE),
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
            after_s = getattr(error, "retry_after_s", None)
            assert answers.failure(found.value).retry_after_s == after_s
            kinds = {type(detail).__name__: detail for detail in await details(call)}
            assert kinds.pop("RequestInfo").request_id == "mine"
            if isinstance(error, RequestError):
                (violation,) = kinds.pop("BadRequest").field_violations
                assert (violation.field, violation.description) == ("top_p", str(error))
            if after_s is not None:
                delay = kinds.pop("RetryInfo").retry_delay
                assert delay.ToTimedelta().total_seconds() == after_s
            assert not kinds

    ask(Handle(Poet(error=error)), use)


def test_an_id_that_is_too_long_does_not_hide_its_refusal() -> None:
    """It would not fit behind the answer."""
    poet = Poet(error=RequestError("request_id must be at most 200 characters", "request_id"))

    async def use(stub: Stub) -> None:
        asked = request(request_id="春" * 100_000)
        for call in (stub.Generate(asked), stub.GenerateStream(asked)):
            error = await refusal(call if hasattr(call, "__await__") else call.read())
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            bad, which = await details(call)
            assert [violation.field for violation in bad.field_violations] == ["request_id"]
            assert asked.request_id.startswith(which.request_id)

    ask(Handle(poet), use)


def test_a_refusal_says_which_request_it_was_though_its_caller_did_not() -> None:
    poets = [Poet(error=NotFound("no model of that name")), Poet(error=ZeroDivisionError("a bug"))]

    async def use(stub: Stub) -> None:
        for _ in poets:
            call = stub.Generate(request())
            await refusal(call)
            (detail,) = await details(call)
            drawn.append(detail.request_id)

    drawn: list[str] = []
    ask(Handle(*poets), use)
    assert drawn == [poet.tickets[0].holder for poet in poets]


def test_an_error_that_was_raised_across_ray_is_the_same() -> None:
    class Raising(Poet):
        async def edge_unary(self, method: str, data: bytes, ticket: Ticket) -> Answer:
            raise NotFound("no model of that name")

    async def use(stub: Stub) -> None:
        error = await refusal(stub.Generate(request()))
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert error.details() == "no model of that name"

    ask(Handle(Raising()), use)


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


def test_a_replica_says_what_came_before_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word comes a moment later than the deadline."""
    monkeypatch.setattr("serve.edge.forward.REPLICA_SAYS_S", 5.0)

    class Late(Poet):
        async def edge_unary(self, method: str, data: bytes, ticket: Ticket) -> Answer:
            await asyncio.sleep(0.21)
            return DeadlineExceeded("the deadline of 0.2 s has passed after 38 tokens")

    async def use(stub: Stub) -> None:
        error = await refusal(stub.Generate(request(deadline_ms=200), timeout=10))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.details() == "the deadline of 0.2 s has passed after 38 tokens"

    ask(Handle(Late()), use)


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


def test_bytes_that_are_no_message_reach_the_replica_unchanged() -> None:
    poet = Poet(error=RequestError("the request is not a GenerateRequest", "prompt"))

    async def run() -> None:
        async with edge(Handle(poet)) as target, grpc.aio.insecure_channel(target) as channel:
            call = channel.unary_unary("/gptmoe.v1.Generation/Generate")
            error = await refusal(call(b"\xff\xff\xff", timeout=5))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(run())
    assert poet.asked == [("Generate", b"\xff\xff\xff")]


@settings(max_examples=10)
@given(blobs=st.lists(st.binary(max_size=40) | st.binary(min_size=64, max_size=64), max_size=20))
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
