"""A group of shards as its supervisor sees it, without Ray."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from cluster.messages import Owner, Shard, Topology
from cluster.shards.executor import ShardsExecutor
from cluster.shards.group import ShardGroup
from cluster.shards.muster import GroupJob, Muster
from gptmoe.generate.executor import CacheLost
from gptmoe.generate.plan import StepPlan
from gptmoe.model.spec import ModelSpec
from gptmoe.shard.parts import arrange

SPEC = ModelSpec(
    num_layers=2, d_model=16, num_heads=2, d_ff=32, vocab_size=51, max_seq_len=16, num_experts=(4,)
)


@pytest.fixture
def group() -> ShardGroup:
    """Two stages that nobody has started."""
    job = GroupJob(
        run="test",
        parts=arrange(SPEC, pp=2),
        checkpoint="/nowhere",
        config_digest="",
        dtype="float32",
        vocab_size=51,
        slots=1,
        num_cpus=1,
        threads=1,
    )
    return ShardGroup(job)


def test_shards_that_came_back_while_nobody_asked_have_lost_the_cache(group: ShardGroup) -> None:
    """Else a prompt that begins like an earlier one would go on behind keys that are not there."""
    shards = [SimpleNamespace(run=lambda plan, tokens: torch.zeros(1)) for _ in range(2)]
    first, second = cast(list[ShardsExecutor], shards)
    plan = StepPlan(spans=(), num_decoding=0)
    group._muster = cast(Muster, SimpleNamespace(job=group.job))
    group._set_live(first)
    for _ in range(2):
        group.run(plan, {})
    group._set_live(None)  # a shard died
    group._set_live(second)
    with pytest.raises(CacheLost):
        group.run(plan, {})
    for _ in range(2):
        group.run(plan, {})


def test_letting_go_of_weights_does_not_wait_for_a_shard_that_is_lost(
    group: ShardGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a shard that freezes at that moment is missed 5 s later."""
    gave_up: list[bool] = []
    silent_s = group.job.limits.silent_s

    def keep(versions: tuple[int, ...], hopeless: Callable[[], bool]) -> None:
        for step_s, age_s in ((None, silent_s + 1), (1.0, silent_s - 1), (1.0, silent_s + 1)):
            group._step_began_s = step_s
            late = replace(owner, rank=1, heartbeat_age_s=age_s)
            topology = Topology(epoch=1, run="test", owners=(owner, late))
            monkeypatch.setattr(group, "topology", partial(replace, topology))
            gave_up.append(hopeless())

    owner = Owner(worker="a", rank=0, node="here", pid=1, shard=Shard())
    group._muster = cast(Muster, SimpleNamespace(keep=keep))
    group.keep({3})
    group._upkeep(None, fresh=False)  # type: ignore[arg-type]
    assert gave_up == [False, False, True]


def test_weights_can_be_refreshed_after_letting_go_of_some_has_failed(group: ShardGroup) -> None:
    def keep(versions: tuple[int, ...], hopeless: Callable[[], bool]) -> None:
        raise RuntimeError("the object store is full")

    refreshed: list[int] = []
    group._muster = cast(
        Muster,
        SimpleNamespace(keep=keep, refresh=lambda at, version, lost: refreshed.append(version)),
    )
    group._set_live(cast(ShardsExecutor, SimpleNamespace()))
    group.keep({3})
    with pytest.raises(RuntimeError):
        group._upkeep(None, fresh=False)  # type: ignore[arg-type]
    thread = threading.Thread(target=group.refresh, args=("/new", 4), daemon=True)
    thread.start()
    thread.join(5.0)
    assert refreshed == [4]
