"""A real coordinator actor on a real local cluster, and workers in processes of their own."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster import coordinator_actor, local, topology_file
from cluster.coordinator_actor import coordinating, join
from cluster.messages import ExpertRange, Shard, Topology, TopologyRequest
from gptmoe.errors import ClusterError


@pytest.fixture(scope="module")
def cluster() -> Iterator[local.Session]:
    with local.session(workers=2) as session:
        yield session


@ray.remote
def work(run: str, group: str, rank: int, steps: int) -> int:
    """What a training worker does, without the training."""
    experts = (ExpertRange(layer=1, first=4 * rank, end=4 * rank + 4),)
    shard = Shard(layers=(0, 1), experts=experts)
    reporter = join(run, group, worker=f"train-{rank}", rank=rank, shard=shard)
    for step in range(1, steps + 1):
        reporter.heartbeat(step)
    reporter.heartbeat(steps, {"loss": 2.5}, last=True)
    return reporter.epoch


def test_workers_register_from_their_own_processes(cluster: local.Session, tmp_path: Path) -> None:
    with coordinating("tiny", tmp_path) as channel:
        assert ray.get([work.remote("tiny", "first", rank, 5) for rank in (0, 1)]) == [1, 1]
        assert coordinator_actor.runs() == ["tiny"]
        topology = channel.ask(TopologyRequest())
        assert isinstance(topology, Topology)
        assert [(owner.rank, owner.step) for owner in topology.owners] == [(0, 5), (1, 5)]
        assert {owner.counters["loss"] for owner in topology.owners} == {2.5}
        assert len({owner.pid for owner in topology.owners}) == 2

        assert ray.get(work.remote("tiny", "second", 0, 1)) == 2
        with pytest.raises(ClusterError, match="group first belongs to epoch 1"):
            ray.get(work.remote("tiny", "first", 1, 1))

    written = topology_file.read(tmp_path)
    assert written is not None
    assert (written.epoch, [owner.worker for owner in written.owners]) == (2, ["train-0"])
    assert coordinator_actor.runs() == []


def test_one_run_has_one_coordinator(cluster: local.Session) -> None:
    with pytest.raises(ClusterError, match="run tiny has no coordinator"):
        coordinator_actor.channel("tiny")
    with coordinating("tiny", None):
        second = coordinating("tiny", None)
        with pytest.raises(ClusterError, match="run tiny is under way on this cluster"):
            second.__enter__()
        with coordinating("other", "s3://bucket/run"):
            assert coordinator_actor.runs() == ["other", "tiny"]


def test_training_survives_its_coordinator(
    cluster: local.Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with coordinating("tiny", tmp_path):
        reporter = join("tiny", "first", worker="train-0", rank=0, shard=Shard())
        ray.kill(ray.get_actor("gptmoe-coordinator:tiny", namespace="gptmoe"))
        while "tiny" in coordinator_actor.runs():  # killing does not wait for the end
            time.sleep(0.05)
        reporter.heartbeat(1, last=True)
        reporter.heartbeat(2)
    assert caplog.text.count("no more heartbeats worker=train-0") == 1
    assert "coordinator lost before its last write" in caplog.text
    assert json.loads((tmp_path / "topology.json").read_text())["owners"][0]["worker"] == "train-0"
