"""The edge of an application that Ray Serve builds from its own config file."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import ray.serve

import gptmoe
from cluster import local
from cluster.client import Client, GenerationError
from serve import app
from serve.edge.keeper import DEPLOYMENT
from serve.ports import free_port

WITHIN_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local.session(workers=1):
        ray.serve.start(http_options={"port": free_port("127.0.0.1")})
        try:
            yield
        finally:
            ray.serve.shutdown()


def run(checkpoint: Path, port: int) -> None:
    args = {"name": "poems", "checkpoint": str(checkpoint), "edge": {"port": port}}
    args["health"] = {"drain_s": 1.0, "period_s": 1.0}
    ray.serve.run(app.from_args(args), name="poems", route_prefix="/")


def test_it_answers_comes_back_and_goes_with_the_application(
    cluster: None, small_checkpoint: Path
) -> None:
    port = free_port("127.0.0.1")
    run(small_checkpoint.parents[1], port)
    expected = gptmoe.load(small_checkpoint).generate("春风", max_new_tokens=8, temperature=0.0)
    with Client(f"127.0.0.1:{port}", timeout_s=5.0) as client:
        assert answer(client) == expected
        (edge,) = [
            actor
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if f":Edge:{port}:" in actor["name"]
        ]
        before = listening(port)
        ray.kill(ray.get_actor(edge["name"], edge["namespace"]), no_restart=False)
        wait_for_another(port, before)  # the one that is killed may answer once more
        assert answer(client) == expected

        client.drain()  # what replicas are told reaches them, and leaves the edge alone
        with pytest.raises(GenerationError, match="drain"):
            client.generate("春风", max_new_tokens=1)
        client.drain(resume=True)
        assert answer(client) == expected
        assert len(client.topology().nodes) == 1

        ray.serve.delete("poems")
        deadline_s = time.monotonic() + WITHIN_S
        while _answers(client):
            assert time.monotonic() < deadline_s, "the edge outlives its application"


def test_a_port_that_is_taken_is_said(cluster: None, small_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match="deploy"):
            run(small_checkpoint.parents[1], port)
    details = ray.serve.status().applications["poems"].deployments[DEPLOYMENT]
    assert f"the edge cannot listen on 127.0.0.1:{port}; choose another edge" in details.message
    ray.serve.delete("poems")


def answer(client: Client) -> str:
    """The text, once the edge is there and a replica behind it."""
    deadline_s = time.monotonic() + WITHIN_S
    while True:
        try:
            return client.generate("春风", max_new_tokens=8, temperature=0.0).text
        except GenerationError as error:
            waits = error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
            if not waits or time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def wait_for_another(port: int, before: set[int | None]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not listening(port) - before:
        assert time.monotonic() < deadline_s, "the edge does not come back"
        time.sleep(0.1)


def listening(port: int) -> set[int | None]:
    """The processes that listen there."""
    found = psutil.net_connections("tcp")
    return {one.pid for one in found if one.status == "LISTEN" and one.laddr.port == port}


def _answers(client: Client) -> bool:
    try:
        return bool(client.generate("春风", max_new_tokens=1).token_ids)
    except GenerationError:
        return False
