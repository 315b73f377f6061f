"""The coordinator's state: epochs, fencing, and messages that arrive twice or out of order."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import wire
from cluster.coordinator import FAILURES_KEPT, Coordinator
from cluster.messages import (
    Accepted,
    Begin,
    Begun,
    ExpertRange,
    Failure,
    Heartbeat,
    Message,
    Refusal,
    Register,
    Shard,
    Topology,
    TopologyRequest,
)


@dataclass
class Clock:
    """Time that a test moves."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def register(rank: int, epoch: int = 1, pid: int = 10) -> Register:
    experts = (ExpertRange(layer=1, first=4 * rank, end=4 * rank + 4),)
    return Register(
        epoch=epoch,
        sequence=1,
        worker=f"train-{rank}",
        rank=rank,
        node="here",
        pid=pid + rank,
        shard=Shard(layers=(0, 1), experts=experts),
    )


def heartbeat(rank: int, step: int, sequence: int, epoch: int = 1) -> Heartbeat:
    return Heartbeat(epoch=epoch, sequence=sequence, worker=f"train-{rank}", step=step)


def refused(answer: Message) -> str:
    assert isinstance(answer, Refusal)
    return answer.reason


def test_two_workers_begin_register_and_report() -> None:
    clock = Clock()
    coordinator = Coordinator("tiny", clock)
    assert coordinator.handle(Begin(group="first")) == Begun(epoch=1)
    assert coordinator.handle(Begin(group="first")) == Begun(epoch=1)
    for rank in (1, 0):
        assert coordinator.handle(register(rank)) == Accepted(epoch=1)
    clock.now_s += 5
    assert coordinator.handle(heartbeat(0, step=20, sequence=2)) == Accepted(epoch=1)
    clock.now_s += 2

    topology = coordinator.handle(TopologyRequest())
    assert isinstance(topology, Topology)
    assert (topology.epoch, topology.run) == (1, "tiny")
    assert [(o.worker, o.rank, o.step) for o in topology.owners] == [
        ("train-0", 0, 20),
        ("train-1", 1, 0),
    ]
    assert [owner.heartbeat_age_s for owner in topology.owners] == [2.0, 7.0]
    assert topology.owners[1].shard.experts == (ExpertRange(layer=1, first=4, end=8),)


def test_a_new_group_ends_the_old_epoch() -> None:
    coordinator = Coordinator("tiny", Clock())
    coordinator.handle(Begin(group="first"))
    coordinator.handle(register(0))
    assert coordinator.handle(Begin(group="second")) == Begun(epoch=2)
    assert coordinator.topology().owners == ()

    assert "epoch 1 of worker train-0 is over" in refused(coordinator.handle(heartbeat(0, 9, 9)))
    assert "epoch 2 is live; the worker must stop" in refused(coordinator.handle(register(1)))
    assert "group first belongs to epoch 1" in refused(coordinator.handle(Begin(group="first")))
    assert coordinator.topology() == Topology(epoch=2, run="tiny")


def test_what_a_coordinator_does_not_take_is_refused() -> None:
    coordinator = Coordinator("tiny", Clock())
    assert "an empty one" in refused(coordinator.handle(Begin(group="")))
    assert "epoch 1 of worker train-0 is over" in refused(coordinator.handle(register(0)))
    coordinator.handle(Begin(group="first"))
    assert "not registered" in refused(coordinator.handle(heartbeat(0, 1, 1)))
    assert "does not take Accepted" in refused(coordinator.handle(Accepted(epoch=1)))
    coordinator.handle(register(0))
    stranger = replace(register(0), worker="other", pid=99)
    assert refused(coordinator.handle(stranger)) == (
        "worker other (pid 99) cannot register as rank 0: "
        "in epoch 1 worker train-0 (pid 10) is rank 0"
    )
    assert "train-0 (pid 10)" in refused(coordinator.handle(replace(register(0), pid=11)))


def test_workers_of_other_code_are_refused() -> None:
    coordinator = Coordinator("tiny", Clock())
    coordinator.handle(Begin(group="first"))
    coordinator.handle(replace(register(0), digest="aaa-1"))
    assert refused(coordinator.handle(replace(register(1), digest="bbb-1"))) == (
        "worker train-1 on here runs other code or another config (digest bbb-1) than the workers "
        "of epoch 1 (digest aaa-1); give all nodes the same checkout"
    )
    coordinator.handle(Begin(group="second"))
    other = replace(register(1, epoch=2), digest="bbb-1")
    assert coordinator.handle(other) == Accepted(epoch=2)


def test_why_an_epoch_ended_is_kept_for_people_once() -> None:
    coordinator = Coordinator("tiny", Clock())
    coordinator.handle(Begin(group="first"))
    lost = Failure(epoch=1, reason="the process of worker 1 was killed")
    for _ in range(2):
        assert coordinator.handle(lost) == Accepted(epoch=1)
    coordinator.handle(Begin(group="second"))
    assert coordinator.topology().failures == (lost,)
    answer = coordinator.handle(replace(lost, epoch=3))
    assert refused(answer) == "epoch 3 has not begun, epoch 2 is live"
    for number in range(FAILURES_KEPT + 5):
        coordinator.handle(replace(lost, epoch=2, reason=str(number)))
    failures = coordinator.topology().failures
    assert len(failures) == FAILURES_KEPT
    assert failures[-1].reason == str(FAILURES_KEPT + 4)


def test_bytes_in_bytes_out() -> None:
    coordinator = Coordinator("tiny", Clock())
    answer = coordinator.handle_bytes(wire.encode(Begin(group="first")))
    assert wire.decode(answer) == Begun(epoch=1)
    assert "not a control message" in refused(wire.decode(coordinator.handle_bytes(b"\xff")))
    assert coordinator.epoch == 1


@given(st.data())
def test_repetition_and_disorder_change_nothing(data: st.DataObject) -> None:
    """Any delivery that has every message at least once ends in the same state."""
    sent = [heartbeat(rank, step, sequence=1 + step) for rank in (0, 1) for step in (1, 2, 3)]
    again = data.draw(st.lists(st.sampled_from([*sent, register(0), register(1)]), max_size=8))
    plain, disturbed = Coordinator("tiny", Clock()), Coordinator("tiny", Clock())
    for coordinator, delivery in (
        (plain, sent),
        (disturbed, data.draw(st.permutations(sent + again))),
    ):
        for message in (Begin(group="first"), register(0), register(1), *delivery):
            assert not isinstance(coordinator.handle(message), Refusal)
    assert plain.topology() == disturbed.topology()
    assert [owner.step for owner in plain.topology().owners] == [3, 3]


@pytest.mark.parametrize("message", [heartbeat(0, 1, 1, epoch=7), register(0, epoch=7)])
def test_an_epoch_that_has_not_begun_is_refused(message: Message) -> None:
    coordinator = Coordinator("tiny", Clock())
    coordinator.handle(Begin(group="first"))
    assert "epoch 7" in refused(coordinator.handle(message))
