"""An operator's calls, to an application whose two replicas lie on shards."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
import ray.serve
import ray.util

from cluster import local
from cluster.client import Client, GenerationError
from cluster.coordinator_actor import NAMESPACE, runs
from serve import launch
from serve.config import ParallelConfig, ServeConfig
from serve.controller import Controlled
from serve.registry_actor import PREFIX

NAME = "poems"


@pytest.fixture(scope="module")
def target(small_checkpoint: Path) -> Iterator[str]:
    """One replica, and room for two."""
    config = ServeConfig(
        checkpoint=launch.pinned(small_checkpoint),
        name=NAME,
        http_port=0,
        grpc_port=0,
        threads=1,
        parallel=ParallelConfig(ep=2),
    )
    config = launch.choose_ports(config, check=True)
    with local.session(workers=4) as cluster:
        config = launch.start_proxies(config, cluster)
        launch.deploy(config, num_cpus=cluster.cpus_per_worker)
        yield launch.endpoints(config, cluster).grpc
        launch.remove(NAME, cluster)


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout_s=90) as client:
        yield client


def pids() -> set[int]:
    details: Any = ray.get(
        ray.get_actor("SERVE_CONTROLLER_ACTOR", "serve").get_serve_instance_details.remote()
    )
    return {
        one["pid"] for one in details["applications"][NAME]["deployments"]["Generator"]["replicas"]
    }


def settings() -> dict[str, Any]:
    state = Controlled(NAME).state()
    return {name: getattr(state.settings, name) for name in ("version", "restart", "draining")}


def wait_until(condition: Callable[[], object], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.2)


def test_the_topology_names_the_owners_and_counts_their_rows(client: Client) -> None:
    client.generate("春风", max_new_tokens=20, temperature=0.0)

    def steps() -> list[int]:  # as the last heartbeats had them
        return [owner.step for one in client.topology().topologies for owner in one.owners]

    wait_until(lambda: min(steps()) >= 20, within_s=10)
    answer = client.topology()
    assert (answer.application, answer.replicas, answer.version) == (NAME, 1, 0)
    assert not answer.draining
    (topology,) = answer.topologies
    assert topology.run.startswith(f"{NAME}#")
    assert [(owner.rank, owner.shard.data) for owner in topology.owners] == [(0, 0), (1, 1)]
    ranges = [(one.layer, one.first, one.end) for o in topology.owners for one in o.shard.experts]
    assert ranges == [(1, 0, 2), (1, 2, 4)]
    assert all(owner.counters["weights_bytes"] > 0 for owner in topology.owners)
    rows = [
        sum(value for name, value in owner.counters.items() if name.startswith("rows/1/"))
        for owner in topology.owners
    ]
    assert sum(rows) >= 20
    assert max(owner.heartbeat_age_s for owner in topology.owners) < 5


def test_a_watch_goes_on_until_its_caller_leaves(client: Client) -> None:
    began_s = time.monotonic()
    stream = client.watch_topology(every_s=0.2)
    seen = [next(stream) for _ in range(5)]
    assert time.monotonic() - began_s >= 0.8
    assert all(len(one.topologies) == 1 for one in seen)
    stream.close()


@pytest.mark.parametrize(
    ("method", "data", "sentence"),
    [
        ("GetTopology", b"\xff\xff\xff\xff", "not a gptmoe.v1.ControlQuery"),
        ("Refresh", b"\x0a\x02\xff\xfe", "checkpoint must be UTF-8 text; found other bytes"),
        ("Scale", b"", "replicas must be at least 1 and at most 10000; found 0"),
    ],
)
def test_a_bad_request_is_one_sentence(
    target: str, method: str, data: bytes, sentence: str
) -> None:
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(f"/gptmoe.v1.ClusterControl/{method}")
        with pytest.raises(grpc.RpcError) as error:
            call(data, timeout=30)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in error.value.details()


def test_refresh_tells_all_replicas_and_restarts_none(
    client: Client, tmp_path: Path, save_model: Callable[..., Path]
) -> None:
    before, told = pids(), settings()
    with pytest.raises(GenerationError, match=r"INVALID_ARGUMENT: .*nowhere") as refusal:
        client.refresh(str(tmp_path / "nowhere"))
    assert "\n" not in refusal.value.message
    other = save_model(tmp_path / "other", d_model=64)
    with pytest.raises(GenerationError, match=r"FAILED_PRECONDITION: .* model of another config"):
        client.refresh(str(other))
    assert settings() == told == {"version": 0, "restart": False, "draining": False}

    newer = save_model(tmp_path / "run", step=2, seed=2)
    assert client.refresh(str(tmp_path / "run"), restart=True) == 1
    assert pids() == before
    assert settings() == {"version": 1, "restart": True, "draining": False}
    assert client.topology().checkpoint == str(newer)
    assert client.refresh(str(newer)) == 2
    assert client.generate("春风", max_new_tokens=2).token_ids


def test_replicas_come_and_go_and_leave_nothing_behind(client: Client) -> None:
    (first,) = runs()
    client.scale(2, within_s=80)
    answer = client.topology()
    assert (answer.replicas, answer.version) == (2, 2)
    assert first in {topology.run for topology in answer.topologies}
    assert [len(topology.owners) for topology in answer.topologies] == [2, 2]
    client.scale(1, within_s=30)
    wait_until(lambda: len(runs()) == 1, within_s=30)
    (topology,) = client.topology().topologies

    def left() -> set[str]:
        actors = ray.util.list_named_actors(all_namespaces=True)
        names = {actor["name"] for actor in actors if actor["namespace"] == NAMESPACE}
        return {name for name in names if topology.run not in name} - {PREFIX + NAME}

    wait_until(lambda: not left(), within_s=20)


def test_a_drained_application_refuses_while_a_stream_goes_on(client: Client) -> None:
    stream = client.stream("春风", max_new_tokens=300, temperature=0.0, request_id="long")
    next(stream)
    client.drain()
    for ask in (client.generate, lambda prompt: list(client.stream(prompt))):
        with pytest.raises(GenerationError, match="UNAVAILABLE: poems takes no new requests"):
            ask("明月")
    answer = client.topology()
    assert (answer.draining, answer.version) == (True, 2)
    assert list(stream)[-1].finish_reason == "length"
    client.drain(resume=True)
    assert client.generate("明月", max_new_tokens=2).token_ids
