"""Seconds until eight streams move again after a shard is lost, by phase.

    python -m tests.bench.bench_shard_recovery [--rounds 3] [--json FILE]

Two stages, each with a shard of experts alone: four actors on a local Ray cluster. In the middle of
eight texts one is killed or frozen. Goals: detected within 2 s (frozen: within 2.5 s, since silence
counts after 2 s), streams moving again within 8 s. The texts must be those of one process. Loss of
a node is in tests/faults: a new node takes longer to start than all of this.
"""

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import ray
import torch

import gptmoe
from cluster import env
from cluster.shards.group import ShardGroup
from gptmoe.generate.engine import Engine
from gptmoe.loaded import LoadedModel
from gptmoe.shard.parts import arrange
from tests import small_model
from tests.faults.shards import ENGINE, Texts, job, write

CASES = (
    ("a stage, killed", 1, signal.SIGKILL, 2.0),
    ("a shard of experts, killed", 2, signal.SIGKILL, 2.0),
    ("a stage, frozen", 0, signal.SIGSTOP, 2.5),
    ("a shard of experts, frozen", 3, signal.SIGSTOP, 2.5),
)
PHASES = ("detect", "leave", "start", "load", "meet", "resume", "all")
MOVING_GOAL_S = 8.0
Seconds = dict[str, float]


def lose(group: ShardGroup, model: LoadedModel, expected: Texts, rank: int, number: int) -> Seconds:
    """One loss: seconds of its phases."""
    pid = next(owner.pid for owner in group.topology().owners if owner.rank == rank)
    moments: Seconds = {}

    def hit(engine: Engine) -> None:
        moments["hit"] = time.monotonic()
        os.kill(pid, number)

    def moved() -> None:
        if "hit" in moments:
            moments.setdefault("first", time.monotonic())
            moments["last"] = time.monotonic()

    texts = write(group, model, hit, moved=moved)
    assert texts == expected, "a text is not what one process writes"
    recovery = group.recoveries[-1]
    phases = {name: recovery[f"{name}_s"] for name in ("leave", "start", "load", "meet")}
    detect_s = recovery["began_s"] - moments["hit"]
    all_s = moments["first"] - moments["hit"]
    resume_s = all_s - detect_s - sum(phases.values())
    return {"detect": detect_s, **phases, "resume": resume_s, "all": all_s}


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
        print(f"{'seconds':28}" + "".join(f"{name:>8}" for name in PHASES))
        for title, rank, number, detect_goal_s in CASES:
            with ShardGroup(job(model, arrange(model.spec, pp=2, expert_ranks=1))) as group:
                rounds = [
                    lose(group, model, expected, rank, number) for _ in range(arguments.rounds)
                ]
            middle = {name: statistics.median(found[name] for found in rounds) for name in PHASES}
            print(f"{title:28}" + "".join(f"{middle[name]:8.2f}" for name in PHASES), flush=True)
            reached = middle["detect"] <= detect_goal_s and middle["all"] <= MOVING_GOAL_S
            facts.append({"title": title, "reached": reached, "rounds": rounds})
        ray.shutdown()
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
