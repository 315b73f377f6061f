"""Three replicas of one model: ids, aborts and kept answers hold across them."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.client import Chunk, Client, GenerationError
from cluster.coordinator_actor import NAMESPACE
from serve.config import ReplicasConfig, ServeConfig
from serve.launch import Endpoints, running
from serve.registry_actor import PREFIX
from serve.result_cache import CacheConfig

LONG: dict[str, Any] = {"max_new_tokens": 4000, "temperature": 0.0}


@pytest.fixture(scope="module")
def endpoints(small_checkpoint: Path) -> Iterator[Endpoints]:
    config = ServeConfig(
        checkpoint=small_checkpoint.parents[1],
        name="poems",
        http_port=0,
        grpc_port=0,
        threads=1,
        replicas=ReplicasConfig(min=3, max=3),
        cache=CacheConfig(results_mb=1),
    )
    with running(config) as endpoints:
        yield endpoints


@pytest.fixture
def client(endpoints: Endpoints) -> Iterator[Client]:
    with Client(endpoints.grpc, timeout_s=60) as client:
        yield client


def rest(stream: Iterator[Chunk]) -> Chunk:
    """The last chunk."""
    *_, last = stream
    return last


def aborted(client: Client, request_id: str) -> bool:
    try:
        client.abort(request_id)
    except GenerationError as error:
        if error.code not in ("UNAVAILABLE", "NOT_FOUND"):
            raise
        return False
    return True


def wait_until_all_know(client: Client) -> None:
    """On a busy machine the last of three replicas takes some seconds to find the registry."""
    deadline_s, in_a_row = time.monotonic() + 60, 0
    while in_a_row < 12:
        try:
            client.abort("nobody")
        except GenerationError as error:
            in_a_row = in_a_row + 1 if error.code == "NOT_FOUND" else 0
        assert time.monotonic() < deadline_s


def test_an_abort_reaches_whichever_replica_runs_the_request(client: Client) -> None:
    """Asked of any of three, once all of them have found the registry."""
    wait_until_all_know(client)
    for number in range(6):
        stream = client.stream("春风", request_id=f"mine-{number}", **LONG)
        next(stream)
        client.abort(f"mine-{number}")
        assert rest(stream).finish_reason == "abort"


def test_an_id_of_the_servers_can_be_aborted_too(client: Client) -> None:
    for _ in range(3):
        stream = client.stream("春风", **LONG)
        request_id = next(stream).request_id
        time.sleep(0.2)  # it is told in the background
        client.abort(request_id)
        assert rest(stream).finish_reason == "abort"


def test_a_running_id_is_refused_by_every_replica_and_free_afterwards(client: Client) -> None:
    stream = client.stream("春风", request_id="mine", **LONG)
    next(stream)
    for _ in range(9):
        with pytest.raises(GenerationError, match="ALREADY_EXISTS: request_id 'mine' is running"):
            client.generate("春风", request_id="mine", max_new_tokens=1)
    client.abort("mine")
    rest(stream)
    texts = {
        client.generate("春风", request_id="mine", seed=7, max_new_tokens=8).text for _ in range(9)
    }
    assert len(texts) == 1, "a retry has the same text, wherever it runs"


def test_what_does_not_run_cannot_be_aborted(client: Client) -> None:
    for _ in range(3):
        with pytest.raises(GenerationError, match="NOT_FOUND: no request 'nobody' is running"):
            client.abort("nobody")


def test_answers_are_kept(client: Client) -> None:
    answers = [client.generate("明月", seed=3, max_new_tokens=8) for _ in range(12)]
    assert len({answer.text for answer in answers}) == 1
    kept = [answer for answer in answers if answer.cached_tokens == answer.prompt_tokens]
    assert len(kept) >= 12 - 3, "each of three replicas computes it once"


def test_requests_go_on_without_the_registry(client: Client, endpoints: Endpoints) -> None:
    stream = client.stream("春风", request_id="long", **LONG)
    next(stream)
    ray.kill(ray.get_actor(PREFIX + endpoints.name, namespace=NAMESPACE))
    assert client.generate("春风", request_id="other", max_new_tokens=4).completion_tokens == 4
    deadline_s = time.monotonic() + 30
    while not aborted(client, "long"):  # a new registry is told what runs
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert rest(stream).finish_reason == "abort"
