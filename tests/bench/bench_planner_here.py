"""The planner's memory and step time against runs on this machine, with one core a rank.

    python -m tests.bench.bench_planner_here [--steps 3] [--json FILE]

Each run trains a real model in processes of its own. Its memory is the peak resident set of the
fullest rank above what it held after importing everything, measured with an allocator that keeps
nothing that was freed (MALLOC_MMAP_THRESHOLD_); beside it stands the peak with the default one,
which is faster and keeps fragments. Goals: memory within 10 %, and the runs of each model in their
order of speed, unless two are measured within 10 % of each other.

Rate and latency of the planner's `cpu` were set by runs like these; its memory has one number from
here, what kernels take.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.planner.assumptions import Assumptions
from cluster.planner.devices import machine
from cluster.planner.job import Choice, Job, Recompute
from cluster.planner.search import Plan, make_plan
from gptmoe.data import Batch
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.parallel.apply import build
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.mesh import Mesh, join
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.pipeline import Pipeline
from gptmoe.parallel.updater import PlainUpdater, Updater
from tests.ranks.pool import RankPool
from train.loop import Trainer
from train.passes import StepSettings
from train.schedule import ScheduleSpec
from train.zero import ZeroUpdater

GOAL_MEMORY = 0.1
SAME_SPEED = 0.1
SEQ_LEN, SEQUENCES = 128, 32
SCHEDULE = ScheduleSpec(
    kind="linear", learning_rate=1e-4, min_learning_rate=1e-4, warmup_steps=0, horizon_steps=100
)

DENSE = ModelSpec(
    num_layers=12, d_model=640, num_heads=10, d_ff=2560, vocab_size=8192, max_seq_len=SEQ_LEN
)
MIXTURE = ModelSpec(
    num_layers=6,
    d_model=512,
    num_heads=8,
    d_ff=2048,
    vocab_size=8192,
    max_seq_len=SEQ_LEN,
    num_experts=(8, 8, 8),
    router=RouterSpec(group_sequences=4),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to train a model."""

    model: str
    layout: Layout
    zero: int = 0
    recompute: Recompute = "none"
    microbatch_size: int = 4

    @property
    def spec(self) -> ModelSpec:
        return MIXTURE if self.model == "mixture" else DENSE

    @property
    def choice(self) -> Choice:
        return Choice(
            layout=self.layout,
            microbatch_size=self.microbatch_size,
            zero=self.zero,
            recompute=self.recompute,
        )


RUNS = [
    Run(model="dense", layout=Layout()),
    Run(model="dense", layout=Layout(), recompute="full"),
    Run(model="dense", layout=Layout(), microbatch_size=16),
    Run(model="dense", layout=Layout(dp=2)),
    Run(model="dense", layout=Layout(dp=2), zero=1),
    Run(model="dense", layout=Layout(dp=2, sharded=True), zero=3),
    Run(model="dense", layout=Layout(tp=2)),
    Run(model="dense", layout=Layout(pp=2)),
    Run(model="mixture", layout=Layout()),
    Run(model="mixture", layout=Layout(dp=2)),
    Run(model="mixture", layout=Layout(dp=2, ep=2)),
    Run(model="mixture", layout=Layout(tp=2, ep=2)),
]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one rank."""

    peak_bytes: float
    """Resident above what it held after importing."""
    steps_s: list[float]


class RandomSamples:
    """Sequences of random tokens, a function of the sample index."""

    num_samples = 1000

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def batch(self, first: int, count: int) -> Batch:
        generator = np.random.default_rng(first)
        token_BS = generator.integers(0, self._vocab_size, (count, SEQ_LEN + 1))
        everywhere = np.ones((count, SEQ_LEN), bool)
        return Batch(token_BS[:, :-1], token_BS[:, 1:], everywhere, everywhere)


def measure(rank: int, run: Run, steps: int) -> Measured:
    """Train one step to warm up and `steps` more."""
    mesh = join(run.layout, rank)
    held = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget earlier peaks
    trainer = _trainer(run, mesh)
    seconds = []
    for step in range(1, steps + 2):
        mesh.barrier()
        began_s = time.perf_counter()
        trainer.step(step)
        mesh.barrier()
        seconds.append(time.perf_counter() - began_s)
    return Measured(peak_bytes=_resident_bytes("VmHWM") - held, steps_s=seconds[1:])


def _trainer(run: Run, mesh: Mesh) -> Trainer:
    model = build(
        run.spec,
        mesh,
        torch.device("cpu"),
        compute_dtype=torch.bfloat16,
        seed=1,
        recompute_what=run.recompute,
    )
    updater: Updater = PlainUpdater(model, mesh, OptimizerSpec())
    if run.zero in (1, 2):
        updater = ZeroUpdater(model, mesh, OptimizerSpec(), run.zero)
    share = SEQUENCES // run.layout.dp
    settings = StepSettings(
        seed=0,
        seq_len=SEQ_LEN,
        batch_sequences=SEQUENCES,
        microbatch_size=run.microbatch_size,
        first_sequence=mesh.place.data * share,
        num_sequences=share,
        schedule=SCHEDULE,
    )
    samples = RandomSamples(run.spec.vocab_size)
    return Trainer(
        pipeline=Pipeline(model, mesh), updater=updater, samples=samples, settings=settings
    )


def _resident_bytes(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def predict(run: Run) -> Plan:
    """With the planner's own numbers for a rank with one core."""
    job = Job(spec=run.spec, batch_sequences=SEQUENCES, seq_len=SEQ_LEN, fused_attention=False)
    return make_plan(job, run.choice, machine("cpu").cluster(run.layout.world), Assumptions())


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run beside its prediction."""

    run: Run
    peak_bytes: float
    fragmented_bytes: float
    """The same with the default allocator."""
    step_s: float
    plan: Plan

    @property
    def planned_bytes(self) -> float:
        return self.plan.memory.total + machine("cpu").device.kernel_bytes

    @property
    def memory_error(self) -> float:
        return self.planned_bytes / self.peak_bytes - 1

    @property
    def time_error(self) -> float:
        return self.plan.time.total / self.step_s - 1

    def __str__(self) -> str:
        return (
            f"{self.run.model:8} {self.run.choice!s:66}{self.peak_bytes / 1e9:>7.2f} GB"
            f"{self.planned_bytes / 1e9:>7.2f} GB{self.memory_error:>+7.1%}"
            f"{self.fragmented_bytes / 1e9:>7.2f} GB"
            f"{self.step_s:>8.2f} s{self.plan.time.total:>8.2f} s{self.time_error:>+7.0%}"
        )


def of_all(run: Run, steps: int) -> list[Measured]:
    """By rank, in new processes."""
    with RankPool(run.layout.world) as pool:
        return pool.run(run.layout.world, measure, run, steps, limit_s=600.0)


def peak(ranks: Sequence[Measured]) -> float:
    """Of the fullest rank."""
    return max(rank.peak_bytes for rank in ranks)


def lean_peaks() -> list[float]:
    """By run, with an allocator that gives back what is freed: it reads its settings at the start
    of a process."""
    command = [sys.executable, "-m", "tests.bench.bench_planner_here", "--peaks"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def misordered(rows: Sequence[Row], value: Callable[[Row], float]) -> list[str]:
    """Pairs of runs of one model whose measured order is clear and the predicted one is not it."""
    found = []
    for one, other in itertools.permutations(rows, 2):
        clear = one.step_s < other.step_s * (1 - SAME_SPEED)
        if one.run.model == other.run.model and clear and value(one) > value(other):
            found.append(f"{one.run.choice} is faster than {other.run.choice}")
    return found


def main() -> None:
    """Measure, predict, judge."""
    parser = argparse.ArgumentParser(description="The planner against runs on this machine.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all rows and goals to this file")
    parser.add_argument("--peaks", action="store_true", help="print the peaks in bytes and end")
    arguments = parser.parse_args()
    if arguments.peaks:
        print(json.dumps([peak(of_all(run, 1)) for run in RUNS]))
        return
    peaks = lean_peaks()
    print(
        f"{'':75}{'measured':>10}{'planned':>10}{'':7}{'default':>10}{'measured':>10}{'planned':>10}"
    )
    rows = []
    for run, peak_bytes in zip(RUNS, peaks, strict=True):
        ranks = of_all(run, arguments.steps)
        rows.append(
            Row(
                run=run,
                peak_bytes=peak_bytes,
                fragmented_bytes=peak(ranks),
                step_s=statistics.median(ranks[0].steps_s),
                plan=predict(run),
            )
        )
        print(rows[-1], flush=True)
    worst = max(abs(row.memory_error) for row in rows)
    wrong = misordered(rows, lambda row: row.plan.time.total)
    print(f"memory: at most {worst:.0%} off; in another order than measured: {wrong or 'none'}")
    if arguments.json:
        arguments.json.write_text(json.dumps(_goals(rows, worst, wrong), indent=1), "utf-8")


def _goals(rows: Sequence[Row], worst: float, wrong: Sequence[str]) -> list[dict[str, object]]:
    facts = [asdict(row.run) | {"peak_bytes": row.peak_bytes, "step_s": row.step_s} for row in rows]
    return [
        {"title": "memory within 10 %", "reached": worst <= GOAL_MEMORY, "rows": facts},
        {"title": "order by speed", "reached": not wrong, "pairs": list(wrong)},
    ]


if __name__ == "__main__":
    main()
