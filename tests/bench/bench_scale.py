"""Serving on 8 to 4,096 ranks, simulated: what failures at published rates cost.

    python -m tests.bench.bench_scale [--json FILE]

A model of 142 billion parameters on H100s, as many replicas as fit. Real: the planner's layouts,
parts, memory and links, every message and answer of the control protocol at every rank, muster,
coordinator, supervisor, scheduler, engine. Modelled: seconds (simulated.py), the language model,
Ray, torch.distributed. Only windows around failures are stepped; between them a replica goes on as
in a window without any. Failures: Llama 3's, https://arxiv.org/abs/2407.21783, table 5.

Checked: each text is the one without failures, token by token; no request is lost; all members end
in the same epoch; what was sent in a dead epoch is refused and changes nothing. Goals: goodput of
0.99 at 4,096 ranks, no request lost.
"""

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gptmoe.errors import Unavailable
from gptmoe.generate.engine import Engine
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from tests.bench.scale.failures import (
    DAY_S,
    DAYS,
    FAILURES_PER_DEVICE_DAY,
    Phases,
    draw,
    strikes_of,
)
from tests.bench.scale.group import Group, Recovery
from tests.bench.scale.timing import Replica, plan_replica
from tests.bench.scale.words import Words, expected, requests_of

MODEL, DEVICE = "6.7B+MoE-64", "h100-80gb"
SLOTS_PER_RANK = 8
TOKEN_BUDGET = 2048
SAME_S = 5.0
"""Clients that come again and again are stepped through only at the end of a long outage."""
SIZES = (8, 64, 512, 4096)
LEAST_FAILURES = 40
"""Small sizes are simulated for as long as it takes to see about so many."""
GOODPUT_GOAL = 0.99


@dataclass(slots=True)
class Served:
    """What became of the requests of a window."""

    seconds: float
    unavailable: set[str]
    """Were answered UNAVAILABLE at least once; their clients sent them again."""
    lost: int = 0


def serve(group: Group, requests: Sequence[Request], begin_s: float) -> Served:
    """All requests at once, until the last is answered. Clients do as they are told."""
    group.engine_s = begin_s = max(begin_s, group.clock.now_s)
    group.clock.now_s = begin_s
    slots = group.replica.slots
    config = EngineConfig(
        max_batch_size=slots,
        max_queue=slots,
        max_queue_tokens=1 << 40,
        token_budget=TOKEN_BUDGET,
        prefix_cache=False,  # the simulated caches know lengths and hashes, no beginnings
    )
    engine = Engine(group, Words(), group.replica.timing.job.seq_len, config)  # type: ignore[arg-type]
    coming = [(begin_s, request) for request in requests]
    texts: dict[str, list[int]] = defaultdict(list)
    finished: set[str] = set()
    unavailable: set[str] = set()
    while coming or engine.has_work:
        if not engine.has_work:
            group.engine_s = max(group.engine_s, min(at_s for at_s, _ in coming))
        for at_s, request in [item for item in coming if item[0] <= group.engine_s]:
            engine.add(request)
            coming.remove((at_s, request))
        try:
            deltas = engine.step()
        except Unavailable as refusal:  # as serve/bridge.py
            waiting = [r for r in requests if engine.abort(r.request_id)]
            unavailable |= {r.request_id for r in waiting}
            again_s = max(group.engine_s + refusal.retry_after_s, group.clock.now_s - SAME_S)
            coming += [(again_s, request) for request in waiting]
            for request in waiting:
                texts.pop(request.request_id, None)
            continue
        for delta in deltas:
            assert delta.request_id not in finished
            texts[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                finished.add(delta.request_id)
    for request in requests:
        assert texts[request.request_id] == expected(request), "a text differs"
    return Served(group.engine_s - begin_s, unavailable, len(requests) - len(finished))


@dataclass(slots=True)
class Result:
    """Of one size."""

    ranks: int
    groups: int
    days: float
    failures: int
    recoveries: list[Recovery] = field(default_factory=list)
    behind_s: float = 0.0
    """How much later texts were finished, over all groups."""
    requests: float = 0.0
    """Of all groups and all days."""
    unavailable: int = 0
    lost: int = 0
    epochs: int = 0
    refused: int = 0
    wall_s: float = 0.0

    @property
    def goodput(self) -> float:
        return 1 - self.behind_s / (self.groups * self.days * DAY_S)

    def moving_s(self, share: float) -> float:
        """Seconds from a loss to the next token that this share of losses stays below."""
        every = sorted(recovery.moving_s for recovery in self.recoveries)
        return every[max(0, math.ceil(share * len(every)) - 1)] if every else 0.0


def simulate(
    ranks: int, replica: Replica, days: float, phases: Phases, *, times: float = 1.0, seed: int = 1
) -> Result:
    """All groups, each from its start over all its failures."""
    began_s = time.perf_counter()
    failures = draw(ranks, days, seed, times)
    node = replica.timing.cluster.devices_per_node
    strikes = strikes_of(failures, ranks, len(replica.parts), node, phases)
    groups = ranks // len(replica.parts)
    result = Result(ranks, groups, days, len(failures))
    requests = requests_of(seed, replica.slots)
    alone_s = serve(Group(replica, phases, ()), requests, 0.0).seconds
    result.requests = len(requests) * groups * days * DAY_S / alone_s
    dice = random.Random(seed)
    for index in range(groups):
        group = Group(replica, phases, strikes.get(index, ()), seed=index)
        while group.actors.strikes:
            begin_s = group.actors.strikes[0].at_s - dice.random() * alone_s
            served = serve(group, requests, begin_s)
            result.behind_s += served.seconds - alone_s
            result.unavailable += len(served.unavailable)
            result.lost += served.lost
        group.check_members()
        result.recoveries += group.recoveries
        result.epochs += group.epochs
        result.refused += group.refused
    result.wall_s = time.perf_counter() - began_s
    return result


FAST = Phases(node_bytes_per_s=40e9, process_bytes_per_s=5e9)
"""As DGX SuperPOD promises for reads that go to the devices directly
(https://docs.nvidia.com/dgx-superpod/reference-architecture-scalable-infrastructure-h100/)."""


def days_of(ranks: int) -> float:
    """So many days show enough failures."""
    return max(float(DAYS), LEAST_FAILURES / (ranks * FAILURES_PER_DEVICE_DAY))


def row(result: Result) -> str:
    """One line of the table."""
    return (
        f"{result.ranks:6}{result.groups:7}{result.days:8.0f}"
        f"{result.failures:6}{result.failures / result.days:9.4f}"
        f"{result.moving_s(0.5):9.1f}{result.moving_s(0.99):8.1f}{result.goodput:11.6f}"
        f"{result.unavailable:8}{result.unavailable / result.requests:9.1e}"
        f"{result.lost:6}{result.refused:9}{result.wall_s:8.1f}"
    )


HEAD = (
    f"{'ranks':>6}{'groups':>7}{'days':>8}{'fail.':>6}{'a day':>9}{'median s':>9}{'p99 s':>8}"
    f"{'goodput':>11}{'UNAVAIL.':>8}{'share':>9}{'lost':>6}{'refused':>9}{'wall s':>8}"
)


def main() -> None:
    """Simulate each size, print the table, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    replica = plan_replica(MODEL, DEVICE, 8, SLOTS_PER_RANK)
    layout = replica.timing.layout
    print(
        f"{MODEL} on {DEVICE}: replicas of {len(replica.parts)} (dp={layout.dp} tp={layout.tp} "
        f"ep={layout.ep} pp={layout.pp}), {replica.memory_bytes / 1e9:.0f} GB a rank, "
        f"{replica.weights_bytes[0] / 1e9:.0f} of it weights, {replica.slots} sequences, "
        f"{replica.tokens_per_s:.0f} tokens/s"
    )
    print(HEAD)
    facts = []
    cases = [(ranks, Phases(), "") for ranks in arguments.sizes]
    for ranks, phases, title in [*cases, (arguments.sizes[0], FAST, ", weights at 40 GB/s")]:
        result = simulate(ranks, replica, days_of(ranks), phases)
        print(row(result) + title, flush=True)
        facts.append(judge(result, title))
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def judge(result: Result, title: str) -> dict[str, object]:
    """The goals of one size, with its figures."""
    good = result.goodput >= GOODPUT_GOAL
    return {
        "title": f"{result.ranks} ranks{title}: goodput {GOODPUT_GOAL}, no request lost",
        "reached": good and not result.lost,
        "goodput": result.goodput,
        "unavailable": result.unavailable,
        "lost": result.lost,
        "failures": result.failures,
        "days": result.days,
        "moving_s": {"median": result.moving_s(0.5), "p99": result.moving_s(0.99)},
        "wall_s": result.wall_s,
    }


if __name__ == "__main__":
    main()
