"""How long a run of two workers needs to go on after one of them was killed.

    python -m tests.bench.bench_recovery [--rounds 3] [--json FILE]

Seconds from SIGKILL until the failure is known, until all workers are registered again, until the
first new step; and the steps that were done twice. Goal: 20 s in all on two cores.
"""

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster import env, topology_file
from gptmoe.checkpoint import open_checkpoint
from tests.ray.command import Command, newest_step

TINY = env.ROOT / "configs" / "train" / "tiny.toml"
GOAL_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Seconds since the kill, and steps."""

    known_s: float
    registered_s: float
    first_step_s: float
    steps_lost: int


def measure(folder: Path) -> Recovery:
    """One run, one kill."""
    run_dir = folder / "run"
    words = ["parallel.ep=2", "train.max_steps=100000", "train.validate_every_steps=0"]
    words += ["checkpoint.every_steps=10", f"run.dir={run_dir}"]
    command = Command(folder, "pretrain", str(TINY), *words)
    try:
        command.wait_until(lambda: newest_step(run_dir) > 25)
        topology = topology_file.read(run_dir)
        assert topology is not None
        os.kill(topology.owners[1].pid, signal.SIGKILL)
        began_s, epoch = time.monotonic(), topology.epoch

        def since(reached: str) -> float:
            command.wait_until(lambda: _reached(run_dir, epoch, reached))
            return time.monotonic() - began_s

        known_s = since("known")
        before = newest_step(run_dir)
        saved = int(open_checkpoint(run_dir).progress["step"])
        registered_s = since("registered")
        command.wait_until(lambda: _took_a_step_again(run_dir))
        first_step_s = time.monotonic() - began_s
    finally:
        command.end(signal.SIGKILL)
    return Recovery(
        known_s=known_s,
        registered_s=registered_s,
        first_step_s=first_step_s,
        steps_lost=before - saved,
    )


def _reached(run_dir: Path, epoch: int, what: str) -> bool:
    topology = topology_file.read(run_dir)
    if topology is None:
        return False
    if what == "known":
        return bool(topology.failures)
    return topology.epoch > epoch and len(topology.owners) == 2


def _took_a_step_again(run_dir: Path) -> bool:
    """Whether the second attempt's page of the ledger has more than its first line."""
    pages = sorted((run_dir / "ledger").glob("*-00000.jsonl"))
    return len(pages) > 1 and len(pages[-1].read_text().splitlines()) > 1


def main() -> None:
    """Print each round and the medians."""
    parser = argparse.ArgumentParser(description="Recovery from a killed worker.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    arguments = parser.parse_args()
    rounds = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure(Path(folder)))
        print(rounds[-1], flush=True)
    middle = statistics.median(r.first_step_s for r in rounds)
    verdict = "yes" if middle <= GOAL_S else "NO"
    print(f"first new step after {middle:.1f} s (median)   goal {GOAL_S:g} s: {verdict}")
    if arguments.json:
        facts = {
            "title": "first new step after a kill",
            "reached": middle <= GOAL_S,
            "rounds": [asdict(r) for r in rounds],
        }
        arguments.json.write_text(json.dumps([facts], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
