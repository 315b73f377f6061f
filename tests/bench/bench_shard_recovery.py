"""Seconds until eight streams move again after a shard is lost, by phase.

    python -m tests.bench.bench_shard_recovery [--rounds 3] [--json FILE]

Two stages, each with a shard of experts alone: four actors on a local Ray cluster. In the middle of
eight texts one is killed or frozen. Goals: detected within 2 s (frozen: within 2.5 s, since silence
counts after 2 s), streams moving again within 8 s. The texts must be those of one process.
At last two shards of experts on nodes of their own, and the node under one is removed, with another
to spare: seconds from the order to remove it, of which Ray takes some itself.
"""

import argparse
import json
import os
import signal
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

import gptmoe
from cluster import env
from cluster.shards.group import ShardGroup
from cluster.shards.muster import GroupJob
from gptmoe.loaded import LoadedModel
from gptmoe.shard.parts import arrange
from tests import small_model
from tests.faults.nodes import Nodes
from tests.faults.shards import ENGINE, Seconds, Texts, job, lose, lose_node, write

CASES = (
    ("a stage, killed", 1, signal.SIGKILL, 2.0),
    ("a shard of experts, killed", 2, signal.SIGKILL, 2.0),
    ("a stage, frozen", 0, signal.SIGSTOP, 2.5),
    ("a shard of experts, frozen", 3, signal.SIGSTOP, 2.5),
)
NODE = "a node, removed"
PHASES = ("detect", "leave", "start", "load", "meet", "resume", "all")
DETECT_NODE_GOAL_S = 2.0
MOVING_GOAL_S = 8.0


def tireless(job: GroupJob) -> GroupJob:
    """Without the rests that follow repeated losses: they would be taken for detection."""
    return replace(job, limits=replace(job.limits, free=1000))


def lose_process(
    group: ShardGroup, model: LoadedModel, expected: Texts, rank: int, number: int
) -> Seconds:
    """Send a signal to a shard: seconds of the phases."""
    pid = next(owner.pid for owner in group.topology().owners if owner.rank == rank)
    texts, seconds = lose(group, model, lambda: os.kill(pid, number))
    assert texts == expected, "a text is not what one process writes"
    return seconds


def lose_a_node(path: Path, expected: Texts) -> Seconds:
    """Kill the node under one of two shards, with another node to spare."""
    nodes = Nodes()
    found = lose_node(nodes, path, spare=True)
    nodes.process.communicate(timeout=120)
    assert found["texts"] == expected, "a text is not what one process writes"
    seconds: Seconds = found["seconds"]
    return seconds


def main() -> None:
    """Print medians of each case; write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    env.prepare()
    torch.set_num_threads(1)
    facts = []
    with tempfile.TemporaryDirectory() as folder:
        model = gptmoe.load(small_model.write(Path(folder)))
        expected = write(model.engine(ENGINE).executor, model)
        ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
        parts = arrange(model.spec, pp=2, expert_ranks=1)
        print(f"{'seconds':28}" + "".join(f"{name:>8}" for name in PHASES))
        for title, rank, number, detect_goal_s in CASES:
            with ShardGroup(tireless(job(model, parts))) as group:
                rounds = [
                    lose_process(group, model, expected, rank, number)
                    for _ in range(arguments.rounds)
                ]
            facts.append(report(title, rounds, detect_goal_s))
        ray.shutdown()
        rounds = [lose_a_node(model.path, expected) for _ in range(arguments.rounds)]
        facts.append(report(NODE, rounds, DETECT_NODE_GOAL_S))
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def report(title: str, rounds: list[Seconds], detect_goal_s: float) -> dict[str, Any]:
    """Print the medians; all of it, and whether the goals are reached."""
    middle = {name: statistics.median(found[name] for found in rounds) for name in PHASES}
    print(f"{title:28}" + "".join(f"{middle[name]:8.2f}" for name in PHASES), flush=True)
    reached = middle["detect"] <= detect_goal_s and middle["all"] <= MOVING_GOAL_S
    return {"title": title, "reached": reached, "rounds": rounds}


if __name__ == "__main__":
    main()
