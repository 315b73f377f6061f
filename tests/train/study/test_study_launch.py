"""Processes of a study: how many at a time, until when, and what becomes of those that fail."""

import dataclasses
import logging
import time
from pathlib import Path

import pytest

from gptmoe.errors import ClusterError
from tests.train.study.conftest import Configure, Ended
from train.study.launch import Handle, carry_out, last_step
from train.study.order import PAUSED, Order
from train.study.plan import arm_runs, sized


@pytest.fixture
def orders(configure: Configure) -> list[Order]:
    config = configure("study.seeds=[0,1]", 'study.arms=["dense","switch"]')
    runs = arm_runs(config, sized(config, 3072))
    return [Order(kind="train", config=run.config, threads=1) for run in runs]


@dataclasses.dataclass
class Slow:
    """Runs for a few looks."""

    looks: int = 2
    stopped: bool = False

    def poll(self) -> int | None:
        self.looks -= 1
        return None if self.looks > 0 else 0

    def stop(self) -> None:
        self.stopped = True

    def leave(self) -> None:
        """It has ended."""

    def last_words(self) -> str:
        return ""


@dataclasses.dataclass
class Script:
    """Hands out what it was given, in order."""

    handles: list[Handle]
    started: list[str] = dataclasses.field(default_factory=list)

    def start(self, order: Order) -> Handle:
        self.started.append(order.folder.name)
        return self.handles[len(self.started) - 1]


def test_so_many_at_a_time_in_order(orders: list[Order]) -> None:
    seen: list[list[str]] = []
    script = Script([Slow(), Slow(), Slow(), Slow()])
    outcome = carry_out(
        orders, script, 2, watch=lambda running: seen.append([o.folder.name for o in running])
    )
    assert (outcome.paused, outcome.failures) == (False, [])
    assert script.started == [order.folder.name for order in orders]
    assert max(map(len, seen)) == 2


def test_a_failure_holds_up_no_other(orders: list[Order]) -> None:
    script = Script([Ended(0), Ended(2, "failed: no room"), Ended(PAUSED), Ended(-9)])
    outcome = carry_out(orders, script, 1)
    assert [(it.order, it.reason) for it in outcome.failures] == [
        (orders[1], "no room"),
        (orders[3], "exit code -9"),
    ]
    assert outcome.paused


def test_nothing_is_started_when_the_time_is_up(orders: list[Order]) -> None:
    script = Script([])
    assert carry_out(orders, script, 2, until_s=time.time() - 1).paused
    assert script.started == []
    assert not carry_out([], script, 2, until_s=time.time() - 1).paused


def test_an_interrupt_leaves_nothing_behind(orders: list[Order]) -> None:
    slow = [Slow(looks=10**6), Slow(looks=10**6)]

    def interrupt(running: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(orders, Script([*slow]), 2, watch=interrupt)
    assert all(handle.stopped for handle in slow)


@dataclasses.dataclass
class Stubborn(Slow):
    """Nobody can reach it."""

    def stop(self) -> None:
        raise ClusterError("no Ray cluster answers")

    def leave(self) -> None:
        raise ClusterError("it has not stopped after 60 s")


def test_one_that_cannot_be_ended_keeps_no_other_running(
    orders: list[Order], caplog: pytest.LogCaptureFixture
) -> None:
    stubborn, slow = Stubborn(looks=10**6), Slow(looks=10**6)

    def interrupt(running: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        carry_out(orders, Script([stubborn, slow]), 2, watch=interrupt)
    assert slow.stopped
    name = orders[0].folder.name
    assert f"{name} may still run: it has not stopped after 60 s" in caplog.text


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ('{"step": 1, "loss": 2.0}\n{"step": 27, "loss": 1.0}\n', 27),
        ('{"step": 3, "loss": 2.0}\n{"step": 4, "lo', 3),
        ("", 0),
    ],
)
def test_the_newest_step_is_read_from_the_end(tmp_path: Path, text: str, step: int) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    assert last_step(file) == step
    assert last_step(tmp_path / "none.jsonl") == 0
