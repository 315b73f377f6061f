"""A process of its own with a group of two shards: it must ask the cluster for its token first.

    python -m tests.faults.shards_on ADDRESS CHECKPOINT

Says `now` in the middle of its texts, waits for a line, and ends with what came out as JSON.
"""

import json
import sys

import ray

import gptmoe
from cluster.shards.group import ShardGroup
from gptmoe.generate.engine import Engine
from gptmoe.shard.parts import arrange
from tests.faults.shards import job, write


def main(address: str, checkpoint: str) -> None:
    """Write all texts."""
    model = gptmoe.load(checkpoint)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    with ShardGroup(job(model, arrange(model.spec, dp=2, ep=2))) as group:

        def hit(engine: Engine) -> None:
            say("now")
            sys.stdin.readline()

        before = pids(group)
        texts = write(group, model, hit)
        failures = [failure.reason for failure in group.topology().failures]
        facts = {"texts": texts, "before": before, "after": pids(group), "failures": failures}
        say(json.dumps(facts))
    ray.shutdown()


def pids(group: ShardGroup) -> list[int]:
    return [owner.pid for owner in group.topology().owners]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
