"""Who gets in at the edge: TLS, certificates of callers, keys; what needs none of them."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from cluster.access import Access
from cluster.client import AsyncClient, Client, GenerationError
from cluster.remote import operating
from gptmoe.errors import ClusterError, ConfigError
from serve import access_log
from serve.access_log import AccessLog, LogConfig
from serve.config import EdgeConfig
from serve.edge.backend import Replicas
from serve.edge.server import EdgeServer, server_credentials
from serve.keys import Keys
from tests.certificates import Authority, authority
from tests.edge_calls import edge
from tests.fake_replicas import POEM, Handle, Poet


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture(scope="module")
def tls(ours: Authority) -> dict[str, Path]:
    server = ours.issue("server")
    return {"tls_cert": server.cert, "tls_key": server.key}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("spring-wind\nriver-south operator\n")
    file.chmod(0o600)
    return file


async def told(target: str, access: Access) -> str:
    """The text that a caller gets, or the code that it is refused with."""
    async with AsyncClient(target, timeout_s=5, access=access) as client:
        try:
            text = (await client.generate("静夜")).text
            assert "".join([chunk.text async for chunk in client.stream("静夜")]) == text
        except GenerationError as error:
            return error.code
        return text


@asynccontextmanager
async def open_edge(keys: Keys | None = None, **config: Any) -> AsyncIterator[str]:
    async with edge(Handle(Poet()), keys, **config) as target:
        yield target


def test_tls(ours: Authority, theirs: Authority, tls: dict[str, Path]) -> None:
    async def run() -> None:
        async with open_edge(**tls) as target:
            assert await told(target, Access(ca=ours.own.cert)) == POEM
            assert await told(target, Access(ca=theirs.own.cert)) == "UNAVAILABLE"
            assert await told(target, Access(tls=True)) == "UNAVAILABLE"
            assert await told(target, Access()) == "UNAVAILABLE"
            named = Access(ca=ours.own.cert, server_name="localhost")
            assert await told(target, named) == POEM
            assert await told(target, replace(named, server_name="elsewhere")) == "UNAVAILABLE"

    asyncio.run(run())


def test_certificates_of_callers(ours: Authority, theirs: Authority, tls: dict[str, Path]) -> None:
    known, stranger = theirs.issue("caller"), ours.issue("stranger")
    both = known.cert.with_name("both.pem")
    both.write_bytes(known.key.read_bytes() + known.cert.read_bytes())
    access = Access(ca=ours.own.cert, cert=known.cert, key=known.key)

    async def run() -> None:
        async with open_edge(**tls, client_ca=theirs.own.cert) as target:
            assert await told(target, access) == POEM
            assert await told(target, replace(access, cert=both, key=None)) == POEM
            assert await told(target, Access(ca=ours.own.cert)) == "UNAVAILABLE"
            wrong = replace(access, cert=stranger.cert, key=stranger.key)
            assert await told(target, wrong) == "UNAVAILABLE"

    asyncio.run(run())


def test_the_blocking_client_speaks_tls_too(ours: Authority, tls: dict[str, Path]) -> None:
    def call(target: str) -> str:
        with Client(target, timeout_s=5, access=Access(ca=ours.own.cert)) as client:
            return client.generate("静夜").text

    async def run() -> str:
        async with open_edge(**tls) as target:
            return await asyncio.to_thread(call, target)

    assert asyncio.run(run()) == POEM


def test_keys_and_their_rotation(keys_file: Path) -> None:
    async def run() -> None:
        async with open_edge(Keys(keys_file)) as target:
            for token in ("spring-wind", "river-south"):
                assert await told(target, Access(token=token)) == POEM
            for token in ("", "autumn-moon", "spring-win"):
                assert await told(target, Access(token=token)) == "UNAUTHENTICATED"
            keys_file.write_text("autumn-moon\n")
            assert await told(target, Access(token="autumn-moon")) == POEM
            assert await told(target, Access(token="spring-wind")) == "UNAUTHENTICATED"

    asyncio.run(run())


def test_no_method_of_ours_goes_without_a_key(keys_file: Path) -> None:
    poet = Poet()

    async def run() -> None:
        async with (
            edge(Handle(poet), Keys(keys_file)) as target,
            grpc.aio.insecure_channel(target) as channel,
        ):
            for path in (
                "/gptmoe.v1.Generation/Generate",
                "/gptmoe.v1.Generation/GenerateStream",
                "/gptmoe.v1.ClusterControl/Scale",
                "/gptmoe.v1.ClusterControl/WatchTopology",
                "/gptmoe.v1.Nothing/AtAll",
                "/foo",
            ):
                for metadata in ((), (("authorization", "Basic c3ByaW5nLXdpbmQ="),)):
                    with pytest.raises(grpc.aio.AioRpcError) as error:
                        await channel.unary_unary(path)(b"", metadata=metadata, timeout=5)
                    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED, path

    asyncio.run(run())
    assert not poet.asked


def test_only_an_operators_key_operates(keys_file: Path) -> None:
    """The command of one who may not is one sentence."""
    poet = Poet()

    def drain(target: str, token: str) -> None:
        with operating(target, access=Access(token=token)) as client:
            client.drain()

    async def run() -> None:
        async with edge(Handle(poet), Keys(keys_file)) as target:
            with pytest.raises(ClusterError) as error:
                await asyncio.to_thread(drain, target, "spring-wind")
            assert str(error.value) == (
                f"{target}: Drain wants an operator's key, and this one may only generate and "
                "look; show one with the word operator behind it in the server's keys file"
            )
            assert not poet.asked
            with suppress(ClusterError):  # what a poet answers is no DrainResponse
                await asyncio.to_thread(drain, target, "river-south")

    asyncio.run(run())
    assert [method for method, _ in poet.asked] == ["Drain"]


def test_what_no_replica_answers_has_a_line_in_the_access_log(
    keys_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log.log, "propagate", True)
    caplog.set_level(logging.INFO, "serve.access_log")
    good = Access(token="spring-wind")

    async def run() -> None:
        handle, log = Handle(Poet()), AccessLog(LogConfig(), "poems")
        config = EdgeConfig(port=0, tries=2)
        server = EdgeServer(Replicas(handle), config, Keys(keys_file), log=log)
        target = f"127.0.0.1:{await server.start()}"
        assert await told(target, Access(token="autumn-moon")) == "UNAUTHENTICATED"
        assert await told(target, good) == POEM, "a replica logs it"
        handle.replicas = [Poet(dies_after=0), Poet(dies_after=0)]
        assert await told(target, good) == "UNAVAILABLE"
        await server.stop(0)

    asyncio.run(run())
    ours = [record for record in caplog.records if record.name == "serve.access_log"]
    lines = [json.loads(record.getMessage()) for record in ours]
    assert [line["status"] for line in lines] == ["Unauthenticated", "NoReplica"]
    for line in lines:
        found = [line[name] for name in ("transport", "method", "model")]
        assert found == ["grpc", "Generate", "poems"]
    assert len(lines[1]["request_id"]) == 32, "its caller was told it"
    assert lines[1]["total_s"] > 0.0005, "from when the call began"


def test_health_and_reflection_need_no_key(keys_file: Path) -> None:
    def look(target: str) -> set[str]:
        with grpc.insecure_channel(target) as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            database = ProtoReflectionDescriptorDatabase(channel)
            found = set(database.get_services())
            file = database.FindFileContainingSymbol("gptmoe.v1.Generation")
            assert file.name == "protos/generation.proto"
            assert database.FindFileContainingSymbol("gptmoe.v1.ClusterControl")
            newer = channel.stream_stream(
                "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                reflection_pb2.ServerReflectionRequest.SerializeToString,
                reflection_pb2.ServerReflectionResponse.FromString,
            )
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = newer(iter([ask]), timeout=5)
            assert {one.name for one in answer.list_services_response.service} == found
        return found

    async def run() -> set[str]:
        async with open_edge(Keys(keys_file)) as target:
            return await asyncio.to_thread(look, target)

    assert asyncio.run(run()) == {
        "gptmoe.v1.Generation",
        "gptmoe.v1.ClusterControl",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_reflection_can_be_left_out(keys_file: Path) -> None:
    async def run() -> None:
        async with (
            open_edge(reflection=False) as target,
            grpc.aio.insecure_channel(target) as channel,
        ):
            path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.stream_stream(path)(iter([b""])).read()
            assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(run())


def test_files_that_are_no_certificates(ours: Authority, tls: dict[str, Path]) -> None:
    other = ours.issue("other")
    text = ours.folder / "text.pem"
    text.write_text("春风")
    for wrong, sentence in (
        ({"tls_key": other.key}, "are no certificate and its private key, both in PEM"),
        ({"tls_cert": text}, "are no certificate and its private key"),
        ({"tls_cert": ours.folder / "missing"}, "No such file"),
        ({"client_ca": text}, "edge.client_ca=.* holds no certificate in PEM"),
        ({"client_ca": ours.folder / "missing"}, "No such file"),
    ):
        config = EdgeConfig(port=0, **(tls | wrong))
        with pytest.raises(ConfigError, match=sentence):
            server_credentials(config)


def test_a_port_that_is_taken() -> None:
    async def run(port: int) -> None:
        server = EdgeServer(Replicas(Handle(Poet())), EdgeConfig(port=port))
        with pytest.raises(ConfigError, match="the edge cannot listen on"):
            await server.start()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        asyncio.run(run(taken.getsockname()[1]))
