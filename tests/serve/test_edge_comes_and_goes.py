"""Edges that stop while somebody is served, and those of nodes that come and go."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
import ray
import ray.exceptions
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import generation_pb2_grpc as services
from serve.config import EdgeConfig, ServeConfig
from serve.edge import actor
from serve.edge.actor import Edges
from serve.edge.backend import Replicas
from serve.edge.inlet import Answers
from serve.edge.server import EdgeServer
from serve.names import Ticket
from tests.edge_calls import drain, refusal, request
from tests.fake_replicas import POEM, Handle, Poet

from .conftest import wait_until

# --- one edge --------------------------------------------------------------------------------


class Patient(Poet):
    """Goes on behind its header when it may."""

    may_go_on: asyncio.Event

    async def edge_stream(self, method: str, data: bytes, ticket: Ticket) -> AsyncIterator[Answers]:
        self.may_go_on = asyncio.Event()
        async for chunk in super().edge_stream(method, data, ticket):
            yield chunk
            await self.may_go_on.wait()


def test_a_stream_that_runs_when_the_edge_stops_may_finish() -> None:
    poet = Patient()

    async def run() -> None:
        server = EdgeServer(Replicas(Handle(poet)), EdgeConfig(port=0))
        target = f"127.0.0.1:{await server.start()}"
        async with grpc.aio.insecure_channel(target) as channel:
            stub: Any = services.GenerationStub(channel)
            call = stub.GenerateStream(request())
            chunks = aiter(call)
            assert (await anext(chunks)).HasField("header")
            stopping = asyncio.create_task(server.stop(10.0))
            await asyncio.sleep(0.2)
            error = await refusal(stub.Generate(request(), timeout=5))
            assert error.code() == grpc.StatusCode.UNAVAILABLE, "nobody new comes in"
            assert not stopping.done()
            poet.may_go_on.set()
            assert "".join([chunk.text async for chunk in chunks]) == POEM
            await asyncio.wait_for(stopping, 5)

    asyncio.run(run())


def test_a_stream_that_takes_too_long_ends_with_the_grace() -> None:
    poet = Poet(hangs=True)

    async def run() -> None:
        server = EdgeServer(Replicas(Handle(poet)), EdgeConfig(port=0))
        target = f"127.0.0.1:{await server.start()}"
        async with grpc.aio.insecure_channel(target) as channel:
            stub: Any = services.GenerationStub(channel)
            call = stub.GenerateStream(request())
            ended = asyncio.create_task(refusal(drain(call)))
            await asyncio.sleep(0.2)
            await asyncio.wait_for(server.stop(0.2), 5)
            assert (await asyncio.wait_for(ended, 5)).code() in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.CANCELLED,
            )
            assert poet.cancelled == 1, "and its replica works for nobody no longer"

    asyncio.run(run())


def test_who_watches_health_does_not_hold_it_up() -> None:
    async def run() -> None:
        server = EdgeServer(Replicas(Handle(Poet())), EdgeConfig(port=0))
        target = f"127.0.0.1:{await server.start()}"
        async with grpc.aio.insecure_channel(target) as channel:
            told = []

            async def listen() -> None:
                call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                async for answer in call:
                    told.append(answer.status)

            listening = asyncio.create_task(refusal(listen()))
            await asyncio.to_thread(wait_until, lambda: told)
            await asyncio.wait_for(server.stop(60.0), 10)
            await listening
            assert told[-1] == health_pb2.HealthCheckResponse.NOT_SERVING

    asyncio.run(run())


# --- those of a cluster ----------------------------------------------------------------------


@dataclass
class Actor:
    """An edge's actor, as its handle is used."""

    node: str
    stopped: bool = False

    @property
    def serving(self) -> Any:
        async def answer() -> bool:
            return True

        return SimpleNamespace(remote=answer)

    @property
    def stop(self) -> Any:
        def remote(grace_s: float) -> str:
            self.stopped = True
            return self.node

        return SimpleNamespace(remote=remote)


class Cluster:
    """What Ray says of its nodes, and the actors that were made and killed."""

    def __init__(self) -> None:
        self.alive = {"one": True}
        self.away = False
        self.made: list[Actor] = []
        self.killed: list[Actor] = []

    def nodes(self) -> list[dict[str, Any]]:
        if self.away:
            raise ray.exceptions.RaySystemError("no answer")
        return [{"NodeID": name, "Alive": alive} for name, alive in self.alive.items()]

    def on_node(self, node: str, config: ServeConfig) -> Actor:
        self.made.append(Actor(node))
        return self.made[-1]

    @property
    def names(self) -> list[str]:
        return [one.node for one in self.made]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(ray, "nodes", cluster.nodes)
    monkeypatch.setattr(ray, "get", lambda calls, timeout: None)
    monkeypatch.setattr(ray, "kill", cluster.killed.append)
    monkeypatch.setattr(actor, "_on_node", cluster.on_node)
    monkeypatch.setattr(actor, "_LOOK_EVERY_S", 0.01)
    return cluster


def with_edges(use: Callable[[], None]) -> None:
    edges = Edges(ServeConfig(checkpoint=Path("runs/tiny"), edge=EdgeConfig(port=9443)))
    edges.start()
    try:
        use()
    finally:
        edges.stop(0.0)


def test_nodes_that_come_get_an_edge_and_those_that_go_are_forgotten(cluster: Cluster) -> None:
    def use() -> None:
        assert cluster.names == ["one"]
        cluster.alive["two"] = True
        wait_until(lambda: cluster.names == ["one", "two"])
        cluster.alive["one"] = False  # Ray goes on listing it
        cluster.alive["three"] = True
        wait_until(lambda: cluster.names == ["one", "two", "three"])

    with_edges(use)
    assert sorted(one.node for one in cluster.killed) == ["three", "two"]
    assert [one.stopped for one in cluster.made] == [False, True, True]


def test_a_node_that_comes_back_gets_an_edge_again(cluster: Cluster) -> None:
    def use() -> None:
        cluster.alive = {"one": False, "two": True}
        wait_until(lambda: cluster.names == ["one", "two"])
        cluster.alive = {"one": True, "two": True}
        wait_until(lambda: cluster.names == ["one", "two", "one"])

    with_edges(use)


def test_nodes_that_cannot_be_listed_for_a_while_are_looked_for_again(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    def use() -> None:
        cluster.away = True
        wait_until(lambda: "nodes cannot be listed" in caplog.text)
        cluster.alive["two"] = True
        cluster.away = False
        wait_until(lambda: cluster.names == ["one", "two"])

    with_edges(use)


def test_no_edge_is_made_once_they_were_stopped(cluster: Cluster) -> None:
    with_edges(lambda: None)
    cluster.alive["two"] = True
    assert cluster.names == ["one"]
    assert [one.node for one in cluster.killed] == ["one"]
