"""A run on several Ray nodes of one machine that are lost, drained and added while it trains."""

import json
from pathlib import Path

import pytest

from cluster import env, topology_file
from gptmoe import metrics
from gptmoe.config import load
from tests.faults.nodes import Nodes
from tests.ray.command import Command, losses, newest_step
from tests.train.alone import run_alone
from train import ledger
from train.config import TrainConfig
from train.plan import make_plan

TINY = env.ROOT / "configs" / "train" / "tiny.toml"
STEPS = 180
"""So many that the last node comes in time on a fast machine, too."""
WORDS = (
    "parallel.dp=4",
    "parallel.ep=2",
    "parallel.min_workers=1",
    "parallel.resize_every_s=3",
    "train.microbatch_size=4",
    "router.group_sequences=4",
    "optimizer.kind=sgd",  # Adam magnifies a changed order of sums until routers choose otherwise
    "optimizer.weight_decay=0",
    "schedule.learning_rate=0.03",  # the larger, the sooner rounding is seen
    f"train.max_steps={STEPS}",
    "train.validate_every_steps=0",
    "checkpoint.every_steps=5",
)

SOON = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
"""Ray asks for as many workers as before until it has noticed that a node is gone, and waits a
minute for room that will not come. Where there is room, it is found at once."""


def workers(run_dir: Path) -> int:
    topology = topology_file.read(run_dir)
    return len(topology.owners) if topology else 0


def test_a_run_goes_on_with_whatever_nodes_there_are(nodes: Nodes, tmp_path: Path) -> None:
    """Four workers, two of their nodes lost, one added: each sample once, the curve as in one.

    For three workers the planner gives up ep=2, which they could not share.
    """
    run_dir = tmp_path / "run"
    nodes.change("add", 4)
    words = ["pretrain", str(TINY), *WORDS, f"run.dir={run_dir}", "--address", nodes.address]
    command = Command(tmp_path, *words, **SOON)
    seen: list[int] = []

    def until(count: int, more_steps: int) -> None:
        def is_so() -> bool:
            return workers(run_dir) == count

        command.wait_until(is_so)
        seen.append(workers(run_dir))
        step = newest_step(run_dir)
        command.wait_until(lambda: newest_step(run_dir) > step + more_steps)

    until(4, 12)
    nodes.change("remove", 2)
    until(2, 12)
    nodes.change("add", 1)
    until(3, 2)
    ended = command.end()
    assert ended.code == 0, ended.stderr
    assert seen == [4, 2, 3]

    steps = ledger.read(run_dir)
    ledger.check(steps, 48)
    assert list(steps) == list(range(1, STEPS + 1))
    assert {len(ranges) for ranges in steps.values()} == {2, 3, 4}  # data ranks
    config = load(TrainConfig, TINY, [*WORDS, f"run.dir={tmp_path / 'alone'}", "data.workers=0"])
    whole = losses(run_alone(make_plan("pretrain", config)))
    found = losses(metrics.read(run_dir / "metrics.jsonl"))
    assert found == pytest.approx(whole, rel=1e-6)


def test_a_node_that_is_to_go_is_saved_first(nodes: Nodes, tmp_path: Path) -> None:
    """No checkpoint is due in this run: the one that it goes on from was made upon the notice."""
    run_dir = tmp_path / "run"
    nodes.change("add", 2)
    words = [*WORDS, "parallel.dp=2", "checkpoint.every_steps=0", "train.max_steps=60"]
    run = ["pretrain", str(TINY), *words, f"run.dir={run_dir}", "--address", nodes.address]
    command = Command(tmp_path, *run, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1", **SOON)
    command.wait_until(lambda: workers(run_dir) == 2 and newest_step(run_dir) > 5)
    nodes.change("drain", 1)
    command.wait_until(lambda: workers(run_dir) == 1)
    nodes.change("remove", 1)
    ended = command.end()
    assert ended.code == 0, ended.stderr

    first, second = (page.read_text().splitlines() for page in ledger_pages(run_dir))
    last_of_first, begin_of_second = json.loads(first[-1]), json.loads(second[0])
    assert last_of_first["step"] == begin_of_second["done"]  # not one step was done twice
    assert begin_of_second["done"] < 60
    steps = ledger.read(run_dir)
    ledger.check(steps, 48)
    assert list(steps) == list(range(1, 61))
    topology = topology_file.read(run_dir)
    assert topology is not None
    step = begin_of_second["done"]
    reason = f"a node is about to go; all was saved at step {step}"
    assert topology.failures[0].reason == reason


def ledger_pages(run_dir: Path) -> list[Path]:
    """Those of data rank 0, by attempt."""
    return sorted((run_dir / "ledger").glob("*-00000.jsonl"))
