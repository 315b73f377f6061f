"""Shards that are killed, frozen and lost with their node while eight texts are written."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

import gptmoe
from cluster import env
from cluster.coordinator_actor import NAMESPACE, PREFIX
from cluster.shards.group import BLIND_S, ShardGroup
from cluster.shards.muster import GroupJob
from gptmoe.errors import ClusterError
from gptmoe.generate.engine import Engine
from gptmoe.loaded import LoadedModel
from gptmoe.shard.parts import arrange
from tests import small_model
from tests.faults.shards import ENGINE, Texts, job, write

KILLED = r"rank {0} (died|is lost: )"
"""Ray or a neighbour, whoever tells it first."""
MOVING_WITHIN_S = 20.0
"""Generous: machines that run tests are busy. The bench has the goal of 8 s."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return gptmoe.load(small_model.write(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    """A local cluster for the groups of this module."""
    env.prepare()
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=80_000_000,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected(model: LoadedModel) -> Texts:
    """The texts as one process writes them."""
    return write(model.engine(ENGINE).executor, model)


@pytest.fixture(scope="module")
def group(local: None, model: LoadedModel) -> Iterator[ShardGroup]:
    """Two stages, each with a shard of experts alone."""
    parts = arrange(model.spec, pp=2, expert_ranks=1)
    with ShardGroup(job(model, parts)) as group:
        yield group


def pid_of(group: ShardGroup, rank: int) -> int:
    return next(owner.pid for owner in group.topology().owners if owner.rank == rank)


@pytest.mark.parametrize(
    ("rank", "number", "reason"),
    [
        pytest.param(1, signal.SIGKILL, KILLED.format(1), id="a stage is killed"),
        pytest.param(2, signal.SIGKILL, KILLED.format(2), id="a shard of experts is killed"),
        pytest.param(0, signal.SIGSTOP, "rank 0 is silent", id="a stage is frozen"),
        pytest.param(3, signal.SIGSTOP, "rank 3 is silent", id="a shard of experts is frozen"),
    ],
)
def test_texts_go_on_when_a_shard_is_lost(
    group: ShardGroup,
    model: LoadedModel,
    expected: Texts,
    rank: int,
    number: int,
    reason: str,
) -> None:
    before = {owner.rank: owner.pid for owner in group.topology().owners}
    began_s = time.monotonic()
    texts = write(group, model, lambda engine: os.kill(before[rank], number))
    assert texts == expected
    assert time.monotonic() - began_s < MOVING_WITHIN_S
    after = {owner.rank: owner.pid for owner in group.topology().owners}
    assert {r for r in before if before[r] != after[r]} == {rank}  # the others kept their weights
    assert re.match(reason, group.topology().failures[-1].reason)
    assert f"started again: rank {rank}" in group.topology().failures[-1].reason
    assert not Path(f"/proc/{before[rank]}").exists()


def test_an_idle_group_stays_and_serves(
    group: ShardGroup, model: LoadedModel, expected: Texts
) -> None:
    recoveries = len(group.recoveries)
    time.sleep(group.job.group_timeout_s + 2)
    assert write(group, model) == expected
    assert len(group.recoveries) == recoveries


def test_weights_are_refreshed_while_texts_are_written(
    group: ShardGroup, model: LoadedModel, expected: Texts, tmp_path: Path
) -> None:
    newer = gptmoe.load(small_model.write(tmp_path, seed=4))

    def refresh(engine: Engine) -> None:
        group.refresh(str(newer.path), 1)
        engine.refresh(1)

    assert write(group, model, refresh) == expected  # running texts finish on their weights
    again = write(newer.engine(ENGINE).executor, newer)
    assert again != expected
    assert write(group, newer, version=1) == again

    def kill(engine: Engine) -> None:
        os.kill(pid_of(group, 0), signal.SIGKILL)

    assert write(group, newer, kill, version=1) == again  # also if one starts anew
    group.refresh(str(model.path), 2)
    assert write(group, model, version=2) == expected


def test_weights_of_another_model_are_refused_and_nothing_changes(
    group: ShardGroup, tmp_path: Path
) -> None:
    job = group._muster.job
    other = small_model.write(tmp_path, num_layers=2)
    with pytest.raises(ClusterError, match="holds a model of another config"):
        group.refresh(str(other), 9)
    assert group._muster.job == job


def test_two_groups_side_by_side_do_not_mix(
    group: ShardGroup, model: LoadedModel, expected: Texts
) -> None:
    """Each in a process of its own, as replicas are."""
    path = str(model.path)

    @ray.remote(num_cpus=0)
    def other() -> Texts:
        mine = gptmoe.load(path)
        with ShardGroup(job(mine, arrange(mine.spec, dp=2, ep=2), run="other")) as second:
            return write(second, mine)

    env_vars = {"PYTHONPATH": str(env.ROOT)}
    assert ray.get(other.options(runtime_env={"env_vars": env_vars}).remote()) == expected
    assert [owner.rank for owner in group.topology().owners] == [0, 1, 2, 3]


def test_no_room_is_a_sentence(local: None, model: LoadedModel) -> None:
    parts = arrange(model.spec, dp=16)
    from_here = GroupJob(**{**vars_of(job(model, parts, run="large")), "start_s": 1.0})
    with pytest.raises(ClusterError, match=r"no room for 16 shards of 1 CPU each after 1 s"):
        ShardGroup(from_here).__enter__()


def vars_of(job: GroupJob) -> dict[str, object]:
    return {name: getattr(job, name) for name in GroupJob.__dataclass_fields__}


def test_a_group_that_nobody_watches_says_so(group: ShardGroup) -> None:
    """Last of those that share the group: it is of no use afterwards."""
    group.check()
    ray.kill(ray.get_actor(PREFIX + group.job.run, namespace=NAMESPACE))
    time.sleep(BLIND_S + 5)
    with pytest.raises(ClusterError, match="nobody has watched over this replica's shards"):
        group.check()
