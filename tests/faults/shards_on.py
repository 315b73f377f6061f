"""A process of its own with a group of two shards: it must ask the cluster for its token first.

    python -m tests.faults.shards_on ADDRESS CHECKPOINT OUT

Says `placed` when the shards are there, `now` in the middle of its texts, each time waits for a
line, and writes to OUT what came out as JSON: the texts, the processes before and after, failures,
and seconds of the recovery's phases. (Ray prints a dead node's last words.)
"""

import json
import sys
from pathlib import Path

import ray

import gptmoe
from cluster.shards.group import ShardGroup
from gptmoe.shard.parts import arrange
from tests.faults.shards import job, lose


def main(address: str, checkpoint: str, out: str) -> None:
    """Write all texts."""
    model = gptmoe.load(checkpoint)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    with ShardGroup(job(model, arrange(model.spec, dp=2, ep=2))) as group:
        before = pids(group)
        ask("placed")
        texts, seconds = lose(group, model, lambda: ask("now"))
        failures = [failure.reason for failure in group.topology().failures]
        facts = {"before": before, "after": pids(group), "failures": failures}
        found = {"texts": texts, "seconds": seconds, **facts}
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    ray.shutdown()


def pids(group: ShardGroup) -> list[int]:
    return [owner.pid for owner in group.topology().owners]


def ask(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
