"""What a coordinator keeps in topology.json, and when."""

import json
from pathlib import Path

from cluster import wire
from cluster.coordinator_actor import CoordinatorActor
from cluster.messages import Begin, Message

from .test_coordinator import Clock, heartbeat, register


def test_a_worker_that_is_heard_of_again_is_written_at_once(tmp_path: Path) -> None:
    clock = Clock()
    coordinator = CoordinatorActor("tiny", str(tmp_path), clock)

    def ages_s(*messages: Message) -> list[float]:
        for message in messages:
            coordinator.handle(wire.encode(message))
        owners = json.loads((tmp_path / "topology.json").read_text())["owners"]
        return [owner["heartbeat_age_s"] for owner in owners]

    assert ages_s(Begin(group="first"), register(0), register(1)) == [0, 0]
    clock.now_s += 26  # to build a model on a loaded machine
    assert ages_s(heartbeat(0, step=0, sequence=2)) == [0, 26]
    clock.now_s += 0.25
    assert ages_s(heartbeat(1, step=0, sequence=2)) == [0.25, 0]
    clock.now_s += 1
    assert ages_s(heartbeat(0, step=9, sequence=3)) == [0.25, 0], "at most every 2 s"
    clock.now_s += 1
    assert ages_s(heartbeat(1, step=9, sequence=3)) == [1, 0]
