"""What Ray Train costs: tokens/s of a run on it against the same workers under torchrun.

    python -m tests.bench.bench_orchestration [--pairs 7] [--json FILE]

Two workers that share the experts, from step 40 to the end by the clock: what happens between the
steps counts, a cluster that is still starting does not. Goal: at most 7 % apart (Ray itself, idle,
takes 4 to 7 % of two cores).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster import env
from cluster.follow import Tail
from tests.ray.command import Command

TINY = env.ROOT / "configs" / "train" / "tiny.toml"
FIRST, LAST = 40, 140
WORDS = (
    "parallel.ep=2",
    "train.validate_every_steps=0",
    "checkpoint.every_steps=0",
    f"train.max_steps={LAST}",
)
BATCH_TOKENS = 6144
GOAL = 0.93


def steps_per_s(run_dir: Path, is_running: Callable[[], bool]) -> float:
    """Between the moments when the first and the last step counted were recorded."""
    seen: dict[int, float] = {}
    tail = Tail(run_dir / "metrics.jsonl")  # reads what is new: looking must cost next to nothing
    while LAST not in seen:
        for record in tail.new():
            seen.setdefault(record["step"], time.perf_counter())
        assert LAST in seen or is_running()
        time.sleep(0.02)
    return (LAST - FIRST) / (seen[LAST] - seen[FIRST])


def with_ray(folder: Path) -> float:
    """Steps a second of `python -m train pretrain`."""
    command = Command(folder, "pretrain", str(TINY), *WORDS, f"run.dir={folder / 'run'}")
    rate = steps_per_s(folder / "run", command.is_running)
    assert command.end().code == 0
    return rate


def with_torchrun(folder: Path) -> float:
    """Steps a second of the same workers under torchrun."""
    words = [*WORDS, f"run.dir={folder / 'run'}", "data.workers=0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "tests.bench.torchrun_entry", str(TINY), *words]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        command, cwd=env.ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        rate = steps_per_s(folder / "run", lambda: process.poll() is None)
    assert process.returncode == 0
    return rate


def main() -> None:
    """Print each pair and the median ratio with the middle half."""
    parser = argparse.ArgumentParser(description="Ray Train against torchrun.")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all pairs to this file")
    arguments = parser.parse_args()
    ratios = []
    for number in range(arguments.pairs):
        rates: dict[str, float] = {}
        turns = [("ray", with_ray), ("torchrun", with_torchrun)]
        for name, run in turns[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                rates[name] = run(Path(folder))
        ratios.append(rates["ray"] / rates["torchrun"])
        tokens = {name: f"{rate * BATCH_TOKENS:,.0f} tokens/s" for name, rate in rates.items()}
        print(f"{ratios[-1]:.3f}  {tokens}", flush=True)
    low, middle, high = statistics.quantiles(ratios, n=4)
    verdict = "yes" if middle >= GOAL else "NO"
    print(f"ray / torchrun: {middle:.3f} ({low:.3f} to {high:.3f})   goal {GOAL}: {verdict}")
    if arguments.json:
        facts = {"title": "ray / torchrun", "reached": middle >= GOAL, "ratios": ratios}
        arguments.json.write_text(json.dumps([facts], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
