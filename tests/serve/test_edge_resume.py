"""The edge when replicas die: other ones go on with the same text, or the caller is told."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2

from gptmoe.errors import AlreadyRunning, ClusterError, Overloaded, Unavailable
from protos import generation_pb2 as messages
from serve.edge.inlet import Answers
from serve.names import Ticket
from tests.edge_calls import Stub, ask, details, drain, edge, refusal, request, streamed
from tests.fake_replicas import POEM, Handle, Poet


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


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED", "INTERNAL"])
def test_a_broken_connection_is_a_lost_replica(code: str) -> None:
    """Handles ask over gRPC: what happens between them and a replica is of gRPC's making."""
    broken = grpc.aio.AioRpcError(grpc.StatusCode[code], grpc.aio.Metadata(), grpc.aio.Metadata())
    poets = [Poet(dies_after=3, death=broken), Poet(dies_after=0, death=broken), Poet()]

    async def stream(stub: Stub) -> str:
        return "".join(chunk.text for chunk in await streamed(stub))

    async def whole(stub: Stub) -> str:
        return str((await stub.Generate(request())).text)

    assert ask(Handle(*poets), stream) == POEM
    assert ask(Handle(*poets[1:]), whole) == POEM


def test_each_replica_hears_whose_request_goes_on() -> None:
    """One holder for a call, another for the next; the id of a call without one is its holder."""
    poets = [Poet(dies_after=0), Poet(dies_after=3), Poet()]

    async def use(stub: Stub) -> list[messages.GenerateChunk]:
        return await streamed(stub)

    (first, *_) = ask(Handle(*poets), use)
    holder = first.header.request_id
    assert [poet.tickets for poet in poets] == [[Ticket(holder, turn)] for turn in range(3)]
    assert len(holder) == 32
    again = [Poet(dies_after=0), Poet()]

    async def whole(stub: Stub) -> str:
        return str((await stub.Generate(request(request_id="mine"))).text)

    assert ask(Handle(*again), whole) == POEM
    (one,), (two,) = (poet.tickets for poet in again)
    assert (one.turn, two.turn) == (0, 1)
    assert one.holder == two.holder not in (holder, "mine")


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
        assert "no replica could finish the request; send it again" in error.details()
        assert error_details_pb2.RetryInfo in map(type, await details(call))

    ask(Handle(*poets), use, tries=2)
    assert sum(len(poet.asked) for poet in poets) == 2


@pytest.mark.parametrize("dies_after", [2, 10])
@pytest.mark.parametrize("fields", [{"n": 2}, {"num_beams": 2, "temperature": 0}])
def test_several_answers_do_not_go_on(fields: dict[str, Any], dies_after: int) -> None:
    """Not even behind the finish of one of them: others may not have had theirs."""
    poets = [Poet(dies_after=dies_after), Poet()]

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


def test_an_id_that_somebody_else_has_is_refused_after_a_loss_too() -> None:
    async def use(stub: Stub) -> None:
        error = await refusal(streamed(stub, request_id="mine"))
        assert error.code() == grpc.StatusCode.ALREADY_EXISTS

    ask(Handle(Poet(dies_after=0), Poet(error=AlreadyRunning("mine runs already"))), use)


def test_a_stream_that_has_begun_waits_for_room() -> None:
    """Many streams may come over from a dead replica at once."""
    full = Poet(error=Overloaded("the queue is full", 0.01))
    poets = [Poet(dies_after=3), full, full, full, full, Poet()]

    async def use(stub: Stub) -> str:
        return "".join(chunk.text for chunk in await streamed(stub))

    assert ask(Handle(*poets), use) == POEM
    assert len(full.asked) == 4


def test_a_shard_that_is_away_in_mid_stream_is_waited_for() -> None:
    class Stumbling(Poet):
        async def edge_stream(
            self, method: str, data: bytes, ticket: Ticket
        ) -> AsyncIterator[Answers]:
            count = 0
            async for chunk in super().edge_stream(method, data, ticket):
                yield chunk
                count += 1
                if count == 3 and len(self.asked) == 1:
                    yield Unavailable("a shard is away", 0.01)
                    return

    async def use(stub: Stub) -> str:
        return "".join(chunk.text for chunk in await streamed(stub))

    assert ask(Handle(Stumbling()), use) == POEM


def test_nobody_takes_over_in_time() -> None:
    class Busy(Poet):
        async def edge_stream(
            self, method: str, data: bytes, ticket: Ticket
        ) -> AsyncIterator[Answers]:
            await self._for_ever()
            yield (b"",)

    busy = Busy()

    async def use(stub: Stub) -> None:
        error = await refusal(streamed(stub))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "no other replica took it over in time" in error.details()

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
