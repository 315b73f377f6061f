"""A small model behind the edge: TLS, a key, health, and replicas that die."""

import asyncio
import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
import ray.util.state
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import gptmoe
from cluster.access import Access
from cluster.client import AsyncClient, Client, GenerationError
from gptmoe.errors import ConfigError
from gptmoe.generate.scheduler import EngineConfig
from serve.config import AuthConfig, EdgeConfig, HealthConfig, ReplicasConfig, ServeConfig
from serve.edge.actor import Edges
from serve.launch import Endpoints, running
from tests.certificates import authority

TEXT: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.0}
LONG: dict[str, Any] = {"max_new_tokens": 2500, "temperature": 0.0}
"""Runs for seconds: this model's greedy text does not end by itself."""


@pytest.fixture(scope="module")
def access(tmp_path_factory: pytest.TempPathFactory) -> Access:
    folder = tmp_path_factory.mktemp("tls")
    made = authority(folder, "authority")
    made.issue("server")
    keys = folder / "keys"
    keys.write_text("spring-wind operator\n")
    keys.chmod(0o600)
    return Access(ca=made.own.cert, token="spring-wind")


@pytest.fixture(scope="module")
def config(small_checkpoint: Path, access: Access) -> ServeConfig:
    assert access.ca
    folder = access.ca.parent
    return ServeConfig(
        checkpoint=small_checkpoint.parents[1],
        name="poems",
        http_port=0,
        grpc_port=0,
        threads=1,
        replicas=ReplicasConfig(min=2, max=2),
        engine=EngineConfig(max_batch_size=2, max_queue=2),
        health=HealthConfig(period_s=1.0, drain_s=2.0),
        edge=EdgeConfig(
            port=0, tls_cert=folder / "server.pem", tls_key=folder / "server.key", host="127.0.0.1"
        ),
        auth=AuthConfig(keys=folder / "keys"),
    )


@pytest.fixture(scope="module")
def endpoints(config: ServeConfig) -> Iterator[Endpoints]:
    with running(config) as endpoints:
        yield endpoints


@pytest.fixture
def client(endpoints: Endpoints, access: Access) -> Iterator[Client]:
    with Client(endpoints.edge, timeout_s=120, access=access) as client:
        yield client


@pytest.fixture(scope="module")
def expected(small_checkpoint: Path) -> str:
    return gptmoe.load(small_checkpoint).generate("春风", **TEXT)


@pytest.fixture(scope="module")
def long_expected(small_checkpoint: Path) -> str:
    return gptmoe.load(small_checkpoint).generate("春风", **LONG)


def replicas(endpoints: Endpoints) -> list[Any]:
    return [
        actor
        for actor in ray.util.state.list_actors(
            address=endpoints.dashboard, filters=[("state", "=", "ALIVE")], detail=True
        )
        if "ServeReplica:poems:Generator" in actor.class_name
    ]


def answers(client: Client) -> bool:
    try:
        return bool(client.generate("春风", max_new_tokens=2).token_ids)
    except GenerationError:
        return False


def test_a_stream_over_tls_with_a_key(client: Client, expected: str) -> None:
    chunks = list(client.stream("春风", **TEXT))
    assert "".join(chunk.text for chunk in chunks) == expected
    assert chunks[-1].finish_reason == "length"
    assert client.generate("春风", **TEXT).text == expected
    assert client.model().name == "poems"


def test_both_ports_want_the_key(endpoints: Endpoints, access: Access, expected: str) -> None:
    for target, encrypted in ((endpoints.edge, access.ca), (endpoints.grpc, None)):
        for token in ("", "autumn-moon"):
            with Client(target, timeout_s=30, access=Access(ca=encrypted, token=token)) as client:
                for ask in (
                    lambda: client.generate("春风", max_new_tokens=1),
                    lambda: list(client.stream("春风", max_new_tokens=1)),
                    client.model,
                    client.topology,
                ):
                    with pytest.raises(GenerationError) as error:
                        ask()
                    assert error.value.code == "UNAUTHENTICATED"
    with Client(endpoints.grpc, timeout_s=60, access=Access(token="spring-wind")) as client:
        assert client.generate("春风", **TEXT).text == expected
        assert client.topology().replicas == 2


def test_leaving_frees_a_place(endpoints: Endpoints, access: Access, client: Client) -> None:
    """Eight places in two replicas: without a cancel the streams would fill them for long."""
    for _ in range(20):
        stream = client.stream("春风", **LONG)
        next(stream)
        stream.close()

    async def hasty() -> None:
        async with AsyncClient(endpoints.edge, timeout_s=0.5, access=access) as hasty:
            for _ in range(4):
                with pytest.raises(GenerationError) as error:
                    await hasty.generate("春风", **LONG)
                assert error.value.code == "DEADLINE_EXCEEDED"

    asyncio.run(hasty())
    began_s = time.monotonic()
    assert client.generate("春风", max_new_tokens=2).token_ids
    assert time.monotonic() - began_s < 3


def test_health_and_reflection_answer_without_a_key(endpoints: Endpoints, access: Access) -> None:
    assert access.ca
    credentials = grpc.ssl_channel_credentials(access.ca.read_bytes())
    with grpc.secure_channel(endpoints.edge, credentials) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "gptmoe.v1.Generation"):
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        found = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"gptmoe.v1.Generation", "gptmoe.v1.ClusterControl", "grpc.health.v1.Health"} <= found


def test_draining_is_seen_by_who_watches_health(
    endpoints: Endpoints, access: Access, client: Client
) -> None:
    assert access.ca
    credentials = grpc.ssl_channel_credentials(access.ca.read_bytes())
    serving = health_pb2.HealthCheckResponse.SERVING
    with grpc.secure_channel(endpoints.edge, credentials) as channel:
        request = health_pb2.HealthCheckRequest(service="gptmoe.v1.Generation")
        watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=60)
        assert next(watch).status == serving
        client.drain()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        client.drain(resume=True)
        assert next(watch).status == serving
        watch.cancel()


def test_an_edge_that_cannot_listen_says_why(endpoints: Endpoints, config: ServeConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        edges = Edges(replace(config, edge=replace(config.edge, port=port)))
        with pytest.raises(ConfigError, match=f"the edge cannot listen on 127.0.0.1:{port}"):
            edges.start()
        edges.stop(0)


def test_an_edge_that_dies_listens_again(endpoints: Endpoints, client: Client) -> None:
    (edge,) = [
        actor
        for actor in ray.util.state.list_actors(
            address=endpoints.dashboard, filters=[("state", "=", "ALIVE")], detail=True
        )
        if actor.name.startswith("poems:Edge:")
    ]
    os.kill(edge.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 60
    while not answers(client):
        assert time.monotonic() < deadline_s, "no new edge"
        time.sleep(0.2)


def test_a_stream_goes_on_with_the_same_text_when_its_replica_dies(
    endpoints: Endpoints, client: Client, long_expected: str
) -> None:
    """Both die, one after the other: whichever it was, and the second one resumed it."""
    stream = client.stream("春风", request_id="mine", **LONG)
    chunks = list(itertools.islice(stream, 5))
    for actor in replicas(endpoints):
        ray.kill(ray.get_actor(actor.name, namespace="serve"), no_restart=True)
        chunks += itertools.islice(stream, 20)
    chunks += stream
    assert "".join(chunk.text for chunk in chunks) == long_expected
    assert sum(len(chunk.token_ids) for chunk in chunks) == LONG["max_new_tokens"]
    assert {chunk.request_id for chunk in chunks} == {"mine"}
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]


def test_the_headers_id_aborts_a_stream_that_went_on_elsewhere(
    endpoints: Endpoints, client: Client
) -> None:
    """At once, though the registry takes the dead replica for alive for some seconds more."""
    deadline_s = time.monotonic() + 120
    while len(replicas(endpoints)) < 2 or not answers(client):
        assert time.monotonic() < deadline_s, "no new replicas"
        time.sleep(0.5)
    stream = client.stream("春风", **LONG)
    request_id = next(stream).request_id
    for actor in replicas(endpoints):
        ray.kill(ray.get_actor(actor.name, namespace="serve"), no_restart=True)
        list(itertools.islice(stream, 20))
    client.abort(request_id)
    began_s = time.monotonic()
    *_, last = stream
    assert last.finish_reason == "abort"
    assert time.monotonic() - began_s < 5
