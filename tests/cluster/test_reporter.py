"""A worker reports without waiting, stops when fenced off, and outlives its coordinator."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from cluster import env
from cluster.coordinator import Coordinator
from cluster.messages import Accepted, Begin, Heartbeat, Message, Owner, Shard
from cluster.reporter import Reporter
from gptmoe.errors import ClusterError


class Line:
    """A channel to a coordinator in this process, with a delay and a way to break."""

    def __init__(self, handle: Callable[[Message], Message]) -> None:
        self.handle = handle
        self.posted: list[Message] = []
        self.slow = False
        self.broken = False

    def ask(self, message: Message) -> Message:
        if self.broken:
            raise ClusterError("the coordinator does not answer: killed")
        return self.handle(message)

    def post(self, message: Message) -> None:
        self.posted.append(message)
        self.answer = None if self.broken else self.handle(message)

    def poll(self) -> Message | None:
        if self.broken:
            raise ClusterError("the coordinator does not answer: killed")
        return None if self.slow else self.answer


class Scene:
    """A coordinator, a line to it and one reporter, all on one clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.coordinator = Coordinator("tiny", lambda: self.now_s)
        self.line = Line(self.coordinator.handle)
        self.reporter = Reporter(
            self.line,
            "first",
            worker="train-0",
            rank=0,
            shard=Shard(layers=(0, 1)),
            clock=lambda: self.now_s,
        )

    def owner(self) -> Owner:
        return self.coordinator.topology().owners[0]


def test_the_example_of_the_readme_works() -> None:
    text = (env.ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    example = text.partition("```python\n")[2].partition("```")[0]
    scene = Scene()

    def join(run: str, group: str, **facts: Any) -> Reporter:
        return Reporter(scene.line, group, **facts)

    names: dict[str, Any] = {"join": join, "Shard": Shard, "run": "tiny", "group": "new", "step": 3}
    exec(example, names)
    assert (scene.owner().shard, scene.owner().step) == (Shard(layers=(0, 1, 2, 3)), 3)


def test_a_worker_registers_and_reports_at_most_once_a_second() -> None:
    scene = Scene()
    assert (scene.reporter.epoch, scene.owner().worker) == (1, "train-0")
    for step in range(1, 31):
        scene.now_s += 0.1
        scene.reporter.heartbeat(step, {"loss": 1.0 / step})
    assert len(scene.line.posted) == 3
    scene.reporter.heartbeat(31, {"loss": 0.5}, last=True)
    assert (scene.owner().step, scene.owner().counters) == (31, {"loss": 0.5})


def test_a_slow_coordinator_gets_one_message_at_a_time() -> None:
    scene = Scene()
    scene.line.slow = True
    for step in range(1, 10):
        scene.now_s += 2
        scene.reporter.heartbeat(step)
    assert [m.step for m in scene.line.posted if isinstance(m, Heartbeat)] == [1]
    scene.line.slow = False
    scene.reporter.heartbeat(10)
    assert scene.owner().step == 10


def test_a_worker_of_a_dead_epoch_is_told_to_stop() -> None:
    scene = Scene()
    scene.coordinator.handle(Begin(group="second"))
    scene.reporter.heartbeat(1)  # sent; the answer is seen with the next one
    scene.now_s += 2
    with pytest.raises(ClusterError, match="epoch 1 of worker train-0 is over"):
        scene.reporter.heartbeat(2)
    with pytest.raises(ClusterError, match="group first belongs to epoch 1"):
        Reporter(scene.line, "first", worker="train-1", rank=1, shard=Shard())


def test_a_lost_coordinator_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.reporter.heartbeat(1)
    scene.line.broken = True
    with caplog.at_level(logging.WARNING):
        for step in range(2, 9):
            scene.now_s += 2
            scene.reporter.heartbeat(step)
    assert [record.message for record in caplog.records] == [
        "no more heartbeats worker=train-0 reason=the coordinator does not answer: killed"
    ]


def test_registering_without_an_answer_or_with_a_wrong_one_fails() -> None:
    scene = Scene()
    with pytest.raises(ClusterError, match=r"worker train-1 .* cannot register as rank 0"):
        Reporter(scene.line, "first", worker="train-1", rank=0, shard=Shard())
    with pytest.raises(ClusterError, match="unexpected answer Accepted"):
        Reporter(Line(lambda _: Accepted(epoch=1)), "a", worker="w", rank=0, shard=Shard())
    scene.line.broken = True
    with pytest.raises(ClusterError, match="does not answer"):
        Reporter(scene.line, "first", worker="train-2", rank=2, shard=Shard())
