"""What a decode step costs on shards: compute, exchange of rows, control and transfer.

    python -m tests.bench.bench_shards [--rounds 5] [--json FILE]

Eight sequences decode on actors of a local Ray cluster, one thread each, and in one process of one
thread, in turns. A step of the engine on shards is

    compute    in the parts of the model, added up over the stages
    exchange   with rows on their way to experts and back, waiting for the other ranks included
    control    the same messages on their way through all stages and back, without tensors
    transfer   what is left: hidden states, scores, sampling, and waiting for the slowest rank

Goal: control at most 1 ms a step on the critical path. The texts must be those of one process.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray
import torch

import gptmoe
from cluster import env
from cluster.shards.executor import ShardsExecutor
from cluster.shards.group import ShardGroup
from cluster.shards.split import share
from gptmoe.generate.engine import Engine
from gptmoe.generate.executor import Executor
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.plan import Span, StepPlan
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.loaded import LoadedModel
from gptmoe.shard.parts import arrange
from tests import small_model
from tests.faults.shards import job

LAYOUTS = {
    "dp=2 ep=2": {"dp": 2, "ep": 2},
    "pp=2": {"pp": 2},
    "tp=2": {"tp": 2},
    "1 expert rank": {"expert_ranks": 1},
    "pp=2 dp=2 ep=2": {"pp": 2, "dp": 2, "ep": 2},
    "pp=4": {"pp": 4},
}
SEQUENCES, PROMPT, NEW = 8, 16, 64
CONTROL_GOAL_MS = 1.0


@dataclass(frozen=True)
class Costs:
    """Milliseconds a decode step, medians of the steps of one round."""

    total: float
    compute: float
    exchange: float
    control: float
    transfer: float


def decode(
    executor: Executor, model: LoadedModel, after_step: Callable[[], None] = lambda: None
) -> tuple[list[float], list[list[int]]]:
    """Milliseconds of each decode step, and the tokens. `after_step` is called after the prompts
    and after each decode step."""
    engine = Engine(executor, model.tokenizer, 320, EngineConfig(max_batch_size=SEQUENCES))
    for index in range(SEQUENCES):
        sampling = SamplingParams(max_new_tokens=NEW, temperature=0, ignore_end=True)
        prompt = tuple(range(100 + index, 100 + index + PROMPT))
        engine.add(Request(str(index), prompt, sampling))
    engine.step()
    after_step()
    times, tokens = [], [[] for _ in range(SEQUENCES)]
    while engine.has_work:
        began_s = time.perf_counter()
        for delta in engine.step():
            tokens[int(delta.request_id)] += delta.token_ids
        times.append(1000 * (time.perf_counter() - began_s))
        after_step()
    return times, tokens


def on_shards(group: ShardGroup, model: LoadedModel) -> tuple[Costs, list[list[int]]]:
    """Costs of one round."""
    live = group._live
    assert live is not None
    with group._in_use:
        trips = [1000 * _timed(partial(control_only, live)) for _ in range(50)]
    control = statistics.median(trips)
    marks: list[tuple[float, float]] = []
    times, tokens = decode(
        group, model, lambda: marks.append((live.costs.compute_s, live.costs.exchange_s))
    )
    steps = [
        (total, 1000 * (after[0] - before[0]), 1000 * (after[1] - before[1]))
        for total, before, after in zip(times, marks, marks[1:], strict=False)
    ]
    totals, computes, exchanges = zip(*steps, strict=True)
    rest = statistics.median(total - compute - exchange for total, compute, exchange in steps)
    return Costs(
        statistics.median(totals),
        statistics.median(computes),
        statistics.median(exchanges),
        control,
        rest - control,
    ), tokens


def control_only(live: ShardsExecutor) -> None:
    """A decode step cut up, its messages there and back; as a sign of life, which is not run."""
    live._sequence += 1
    spans = tuple(Span(str(slot), slot, PROMPT, 1, 1) for slot in range(SEQUENCES))
    tokens = {span.key: range(PROMPT + 1) for span in spans}
    plan = StepPlan(spans, SEQUENCES)
    shares = share(plan, tokens, live.banks, epoch=live.epoch, sequence=live._sequence)
    steps = [replace(step, most_rows=0) for step in shares.steps]
    alone = [rank for rank, part in enumerate(live.parts) if part.experts_only]
    for rank in live._entries:
        live._line.send(steps[0 if rank in alone else live.parts[rank].data], rank)
    for rank in [*live._exits, *alone]:
        live._done(rank, live._sequence)


def _timed(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def main() -> None:
    """Print the table; write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    env.prepare()
    torch.set_num_threads(1)
    facts = []
    with tempfile.TemporaryDirectory() as folder:
        model = gptmoe.load(small_model.write(Path(folder), num_layers=8, d_model=512))
        print(f"{'layout':16} {'step ms':>8} {'alone':>6} {'ratio':>6}", end="")
        print("  compute exchange control transfer")
        ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
        for name, layout in LAYOUTS.items():
            facts.append(measure(name, layout, model, arguments.rounds))
        ray.shutdown()
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def measure(
    name: str, layout: dict[str, int], model: LoadedModel, rounds: int
) -> dict[str, object]:
    """Rounds on shards and in one process in turns."""
    parts = arrange(model.spec, **layout)
    found, alone = [], []
    with ShardGroup(job(model, parts, run=name)) as group:
        for _ in range(rounds):
            costs, tokens = on_shards(group, model)
            times, expected = decode(
                model.engine(EngineConfig(max_batch_size=SEQUENCES)).executor, model
            )
            assert tokens == expected, "the texts differ"
            found.append(costs)
            alone.append(statistics.median(times))
    middle = {
        key: statistics.median(getattr(costs, key) for costs in found)
        for key in ("total", "compute", "exchange", "control", "transfer")
    }
    one = statistics.median(alone)
    ratio = middle["total"] / one
    print(
        f"{name:16} {middle['total']:8.1f} {one:6.1f} {ratio:6.2f} "
        f"{middle['compute']:8.1f} {middle['exchange']:8.1f} {middle['control']:7.2f} "
        f"{middle['transfer']:8.1f}",
        flush=True,
    )
    reached = middle["control"] <= CONTROL_GOAL_MS
    return {"title": f"control, {name}", "reached": reached, "alone": one, **middle}


if __name__ == "__main__":
    main()
