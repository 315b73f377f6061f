"""The edge in front of real replicas in this process, one of which dies: text, ids, refusals."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

import gptmoe
from gptmoe.errors import GptMoeError
from gptmoe.generate.delta import Delta
from protos import generation_pb2 as messages
from serve.bridge import EngineThread
from serve.edge.inlet import Answer, Answers, Inlet, Progress
from serve.names import Ticket
from serve.registry_actor import Claims, RegistryActor
from serve.rpc import Servicer
from serve.service import Service
from tests import small_model
from tests.characters import Characters
from tests.edge_calls import Stub, ask, details, drain, refusal, request, streamed
from tests.fake_replicas import IDLE, Died, Handle

from .conftest import CARD
from .full_engine import FullEngine
from .near_registry import Handle as RegistryHandle
from .near_registry import until
from .small_service import served

ABORTED = messages.FINISH_REASON_ABORT


class Replica(Servicer, Inlet):
    """As serve/replica.py, without Ray. It dies before its chunk `dies_at`, for good."""

    def __init__(self, service: Service, dies_at: int = 10**9) -> None:
        self.service, self.dies_at = service, dies_at
        self.dead = False
        self.resumed: list[list[int]] = []
        self.claims: Claims | None = None
        self.free = asyncio.Event()  # what it is asked waits for this
        self.free.set()

    async def edge_unary(self, method: str, request: bytes, ticket: Ticket) -> Answer:
        if self.dead:
            raise Died
        return await super().edge_unary(method, request, ticket)

    async def edge_stream(
        self, method: str, request: bytes, ticket: Ticket
    ) -> AsyncIterator[Answers]:
        asked = messages.GenerateRequest.FromString(request)
        self.resumed.append(list(asked.resume_token_ids))
        await self.free.wait()
        number = 0
        async with aclosing(super().edge_stream(method, request, ticket)) as parcels:
            async for parcel in parcels:
                for chunk in (parcel,) if isinstance(parcel, GptMoeError) else parcel:
                    if self.dead or number == self.dies_at:
                        await self._die()
                    yield chunk if isinstance(chunk, GptMoeError) else (chunk,)
                    number += 1

    async def edge_progress(self) -> Progress:
        return IDLE

    async def _die(self) -> None:
        self.dead = True
        if self.claims:
            await self.claims.stop()  # the registry hears nothing of its end
        raise Died


# --- a real engine ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> gptmoe.LoadedModel:
    folder = tmp_path_factory.mktemp("run")
    return gptmoe.load(small_model.write(folder, num_layers=2, d_model=32))


@pytest.fixture
def pair(model: gptmoe.LoadedModel) -> Iterator[list[Replica]]:
    """Two replicas of one model."""
    with ExitStack() as stack:
        services = [stack.enter_context(served(model, model.engine())) for _ in range(2)]
        yield [Replica(service) for service in services]


@pytest.mark.parametrize("dies_at", [1, 4, 9])
def test_a_sampled_text_goes_on_as_if_nothing_had_happened(
    pair: list[Replica], dies_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.bridge.SMOOTH_S", 0.0)  # else a fast machine sends a few chunks
    monkeypatch.setattr("serve.bridge.DELTAS_A_SECOND", 1e9)
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_new_tokens": 200}

    async def use(stub: Stub) -> list[messages.GenerateChunk]:
        return await streamed(stub, logprobs=True, **asked)

    whole = ask(Handle(pair[1]), use)
    pair[0].dies_at = dies_at
    cut = ask(Handle(*pair), use)
    assert pair[0].dead
    assert len(pair[1].resumed) == 2, "the undisturbed one, and the one that went on"
    for of in (lambda chunk: chunk.text, lambda chunk: list(chunk.token_ids)):
        assert [part for chunk in cut for part in of(chunk)] == [
            part for chunk in whole for part in of(chunk)
        ]
    assert cut[-1].finish.completion_tokens == whole[-1].finish.completion_tokens == 200
    assert cut[-1].finish.cumulative_logprob == pytest.approx(
        whole[-1].finish.cumulative_logprob, rel=1e-4
    )


def test_a_wrong_field_is_named_in_the_details(pair: list[Replica]) -> None:
    async def use(stub: Stub) -> None:
        for call in (stub.Generate(request(top_p=7)), stub.GenerateStream(request(top_p=7))):
            streams = isinstance(call, grpc.aio.UnaryStreamCall)
            error = await refusal(drain(call) if streams else call)
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            kinds = {type(detail): detail for detail in await details(call)}
            (violation,) = kinds[error_details_pb2.BadRequest].field_violations
            assert (violation.field, violation.description) == ("top_p", error.details())
            assert kinds[error_details_pb2.RequestInfo].request_id

    ask(Handle(*pair), use)


# --- ids -------------------------------------------------------------------------------------


class SlowEngine(FullEngine):
    """Takes its time, so that there is some for what happens to a request."""

    def step(self) -> list[Delta]:
        time.sleep(0.005)
        return super().step()


class Trio:
    """Three replicas with slow engines, and their registry."""

    def __init__(self) -> None:
        self.bridges = [EngineThread(SlowEngine()) for _ in range(3)]
        self.replicas: list[Replica] = []

    async def started(self) -> None:
        handle = RegistryHandle(RegistryActor())
        for number, bridge in enumerate(self.bridges):
            claims = Claims(f"replica-{number}", lambda: handle, bridge.abort)
            claims.start()
            replica = Replica(Service(bridge, Characters(), CARD, names=claims))
            replica.claims = claims
            self.replicas.append(replica)
        await until(lambda: handle.calls.count("next_aborts") == 3)

    async def stopped(self) -> None:
        for replica in self.replicas:
            assert replica.claims
            await replica.claims.stop()


@pytest.fixture
def trio() -> Iterator[Trio]:
    trio = Trio()
    yield trio
    for bridge in trio.bridges:
        bridge.stop()


def on(trio: Trio, use: Callable[[Stub], Awaitable[None]]) -> None:
    """Calls to an edge in front of them."""
    handle = Handle()

    async def started(stub: Stub) -> None:
        await trio.started()
        handle.replicas = trio.replicas
        try:
            await use(stub)
        finally:
            await trio.stopped()

    ask(handle, started)


async def abort(stub: Stub, request_id: str) -> None:
    await stub.Abort(messages.AbortRequest(request_id=request_id), timeout=5)


async def rest(call: Any) -> list[messages.GenerateChunk]:
    """What is left of a stream that was read from."""
    found = []
    while (chunk := await call.read()) is not grpc.aio.EOF:
        found.append(chunk)
    return found


NAMES = pytest.mark.parametrize("name", ["mine", ""])
ENDLESS = 10**9


@NAMES
def test_the_headers_id_aborts_a_text_that_went_on_elsewhere(trio: Trio, name: str) -> None:
    async def use(stub: Stub) -> None:
        trio.replicas[0].dies_at = 4
        call = stub.GenerateStream(request(request_id=name, max_new_tokens=ENDLESS))
        header = (await call.read()).header
        while not trio.replicas[1].resumed:
            await call.read()
        for _ in range(5):
            await call.read()
        began_s = time.monotonic()
        await abort(stub, header.request_id)
        assert (await rest(call))[-1].finish.reason == ABORTED
        assert time.monotonic() - began_s < 3

    on(trio, use)


@NAMES
def test_an_abort_while_nobody_has_the_text_ends_it_too(
    trio: Trio, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead replica is still listed; the next one takes its time to take over."""
    monkeypatch.setattr("serve.registry_actor.TELL_EVERY_S", 0.0)  # it dies before it would tell

    async def use(stub: Stub) -> None:
        trio.replicas[0].dies_at = 4
        trio.replicas[1].free.clear()
        call = stub.GenerateStream(request(request_id=name, max_new_tokens=ENDLESS))
        header = (await call.read()).header
        await until(lambda: trio.replicas[1].resumed)
        await abort(stub, header.request_id)
        trio.replicas[1].free.set()
        (*_, last) = await asyncio.wait_for(rest(call), 5)
        assert last.finish.reason == ABORTED
        assert last.finish.completion_tokens >= 3, "what the caller had"

    on(trio, use)


def test_nobody_else_gets_an_id_that_went_on(trio: Trio) -> None:
    """Not even who says that he resumes its text."""

    async def use(stub: Stub) -> None:
        trio.replicas[0].dies_at = 4
        call = stub.GenerateStream(request(request_id="mine", max_new_tokens=ENDLESS))
        while not trio.replicas[1].resumed:
            await call.read()
        for fields in ({}, {"resume_token_ids": [ord("一")]}):
            for _ in trio.replicas:
                error = await refusal(stub.Generate(request(request_id="mine", **fields)))
                assert error.code() == grpc.StatusCode.ALREADY_EXISTS
        call.cancel()

    on(trio, use)
