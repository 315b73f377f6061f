"""Health at the edge: it follows how the engines come along."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.edge import backend
from serve.edge.health import answers
from serve.edge.inlet import Progress
from tests.edge_calls import edge
from tests.fake_replicas import IDLE, Handle, Poet

UNKNOWN = health_pb2.HealthCheckResponse.UNKNOWN
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

MOVING = Progress(pending=3, silent_s=0.1, draining=False)
STALLED = Progress(pending=3, silent_s=31.0, draining=False)
LONG_IDLE = Progress(pending=0, silent_s=1000.0, draining=False)
DRAINING = Progress(pending=3, silent_s=0.1, draining=True)


@pytest.mark.parametrize(
    ("found", "serving"),
    [
        ([MOVING], True),
        ([LONG_IDLE], True),
        ([STALLED], False),
        ([DRAINING], False),
        ([], False),
        ([STALLED, DRAINING], False),
        ([STALLED, DRAINING, MOVING], True),
    ],
)
def test_one_replica_that_moves_is_enough(found: list[Progress], serving: bool) -> None:
    assert answers(found, stall_s=30.0) is serving


def with_health(
    handle: Handle, use: Callable[[Any], Awaitable[None]], *, sleeps: bool = False
) -> None:
    async def run() -> None:
        async with (
            edge(handle, health_every_s=0.02, stall_s=30.0, sleeps=sleeps) as target,
            grpc.aio.insecure_channel(target) as channel,
        ):
            await asyncio.wait_for(use(health_pb2_grpc.HealthStub(channel)), 20)

    asyncio.run(run())


def named(service: str) -> Any:
    return health_pb2.HealthCheckRequest(service=service)


@pytest.mark.parametrize("service", ["", "gptmoe.v1.Generation"])
def test_who_watches_sees_every_change(service: str) -> None:
    poet = Poet()

    async def use(stub: Any) -> None:
        watch = stub.Watch(named(service))
        first = (await watch.read()).status
        assert first == SERVING or (first, (await watch.read()).status) == (NOT_SERVING, SERVING)
        for progress, status in (
            (STALLED, NOT_SERVING),
            (MOVING, SERVING),
            (DRAINING, NOT_SERVING),
            (IDLE, SERVING),
        ):
            poet.progress = progress
            assert (await watch.read()).status == status
            assert (await stub.Check(named(service))).status == status

    with_health(Handle(poet), use)


def test_an_unknown_service() -> None:
    async def use(stub: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Check(named("gptmoe.v1.Nothing"))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        assert (await stub.Watch(named("gptmoe.v1.Nothing")).read()).status == SERVICE_UNKNOWN

    with_health(Handle(Poet()), use)


def test_a_replica_that_hangs_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_ANSWER_WITHIN_S", 0.05)
    hanging, other = Poet(progress=None), Poet()

    async def use(stub: Any) -> None:
        watch = stub.Watch(named(""))
        while (await watch.read()).status != SERVING:
            pass
        other.progress = STALLED
        assert (await watch.read()).status == NOT_SERVING

    with_health(Handle(hanging, other), use)


def test_no_replica_at_all_is_not_serving() -> None:
    async def use(stub: Any) -> None:
        await asyncio.sleep(0.1)
        assert (await stub.Check(named(""))).status == NOT_SERVING

    with_health(Handle(), use)


def test_where_a_request_starts_a_replica_none_is_needed() -> None:
    async def use(stub: Any) -> None:
        watch = stub.Watch(named(""))
        while (await watch.read()).status != SERVING:
            pass

    with_health(Handle(), use, sleeps=True)


def test_a_bug_in_looking_is_not_serving_and_looking_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Handle):
        broken = True

        def broadcast(self, method: str) -> Any:
            if self.broken:
                raise ZeroDivisionError("a bug")
            return super().broadcast(method)

    handle = Broken(Poet())

    async def use(stub: Any) -> None:
        watch = stub.Watch(named(""))
        assert (await watch.read()).status == NOT_SERVING
        await asyncio.sleep(0.1)
        handle.broken = False
        assert (await watch.read()).status == SERVING

    with_health(handle, use)
    assert "cannot be asked how they are" in caplog.text
