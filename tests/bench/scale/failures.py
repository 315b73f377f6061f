"""What fails when, and how long each part of a recovery takes. Pure.

Failures: Llama 3's table 5 (arXiv 2407.21783, https://arxiv.org/abs/2407.21783, section 3.3.4): 419
unexpected interruptions in 54 days on 16,384 H100 in nodes of 8. Phases: as measured on a two-core
machine by bench_shard_recovery.py; what is not measured is marked as assumed.
"""

import heapq
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

DAY_S = 86_400.0
FAILURES, DAYS, DEVICES = 419, 54, 16_384
FAILURES_PER_DEVICE_DAY = FAILURES / DAYS / DEVICES

Kind = Literal["process", "frozen", "device", "network", "node"]
CAUSES: Mapping[Kind, int] = {
    "process": 54 + 2,  # software bug, dependency
    "frozen": 7,  # NCCL watchdog timeouts
    "device": 148 + 72 + 19 + 17 + 6 + 6,  # faulty GPU, HBM3, SRAM, processor, thermal, corruption
    "network": 35 + 7,  # switch or cable, NIC
    "node": 32 + 3 + 3 + 2 + 2 + 2 + 2,  # host maintenance, SSD, power, chassis, IO, CPU, memory
}
NODE_KINDS: frozenset[Kind] = frozenset({"device", "network", "node"})
"""The whole node is taken out and another one comes in."""
SILENT_KINDS: frozenset[Kind] = frozenset({"frozen", "network", "node"})
"""Nobody says that the processes have ended: their heartbeats stop."""
NODES_PER_SPARE = 64
"""One spare node for so many, at least one."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What goes wrong when, on which rank of all groups."""

    at_s: float
    rank: int
    kind: Kind


def draw(ranks: int, days: float, seed: int, times: float = 1.0) -> list[Failure]:
    """Failures of so many devices in so many days, `times` as often as published."""
    dice = random.Random(seed)
    per_s = times * ranks * FAILURES_PER_DEVICE_DAY / DAY_S
    found, at_s = [], dice.expovariate(per_s)
    while at_s < days * DAY_S:
        kind = dice.choices(list(CAUSES), list(CAUSES.values()))[0]
        found.append(Failure(at_s, dice.randrange(ranks), kind))
        at_s += dice.expovariate(per_s)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Seconds of the parts of a recovery."""

    leave_s: float = 0.1
    """Measured."""
    start_s: float = 3.2
    """Measured, on two cores without a GPU; each process takes longer or shorter by `spread`."""
    spread: float = 0.25
    """Sigma of the lognormal around `start_s`. Assumed: of many processes the slowest counts."""
    meet_4_s: float = 0.03
    """Measured with 4 ranks; each rank talks to one store and to every other, one by one."""
    kill_frozen_s: float = 7.0
    """Until Ray has ended a process that does not answer (cluster/shards/actors.py)."""
    notice_node_s: float = 15.0
    """Until Ray moves the room of a lost node: 5 checks, one each 3 s (Ray's defaults)."""
    node_bytes_per_s: float = 8e9
    """Weights from disk or network to one node. Assumed."""
    process_bytes_per_s: float = 2e9
    """The same for one process. Assumed."""
    repair_s: float = 4 * 3600.0
    """Until a node that was taken out is a spare again. Assumed."""

    def start_one_s(self, dice: random.Random) -> float:
        """Of one process, from the call to its answer."""
        return self.start_s * dice.lognormvariate(0.0, self.spread)

    def load_s(self, rank_bytes: Sequence[float]) -> float:
        """Of processes of one node that read at the same time, these bytes each."""
        most = max(rank_bytes, default=0.0) / self.process_bytes_per_s
        return max(most, sum(rank_bytes) / self.node_bytes_per_s)

    def meet_s(self, ranks: int) -> float:
        """Of so many ranks."""
        return self.meet_4_s * ranks / 4


@dataclass(slots=True)
class Spares:
    """Nodes without work: when each may be used. One that is taken out is repaired and returns."""

    ready_s: list[float]
    repair_s: float

    def swap(self, now_s: float) -> float:
        """Give a broken node for another one: when that is there."""
        heapq.heappush(self.ready_s, now_s + self.repair_s)
        return max(now_s, heapq.heappop(self.ready_s))


@dataclass(frozen=True, slots=True)
class Strike:
    """A failure as one group feels it."""

    at_s: float
    ranks: tuple[int, ...]
    silent: bool
    room_s: float
    """From when on these ranks may start again."""


def strikes_of(
    failures: Sequence[Failure], ranks: int, size: int, node: int, phases: Phases
) -> dict[int, list[Strike]]:
    """The failures by group; a node that goes takes all groups that lie on it along.

    Groups of `size` ranks, nodes of `node`.
    """
    assert node % size == 0
    assert ranks % size == 0
    spares = Spares([0.0] * max(1, ranks // node // NODES_PER_SPARE), phases.repair_s)
    found: dict[int, list[Strike]] = defaultdict(list)
    for failure in failures:
        at_s, kind = failure.at_s, failure.kind
        whole, silent = kind in NODE_KINDS, kind in SILENT_KINDS
        room_s = spares.swap(at_s) if whole else at_s
        if whole and silent:
            room_s = max(room_s, at_s + phases.notice_node_s)
        first = failure.rank // node * node
        hit = range(first, min(ranks, first + node)) if whole else [failure.rank]
        by_group: dict[int, list[int]] = defaultdict(list)
        for rank in hit:
            by_group[rank // size].append(rank % size)
        for group, own in by_group.items():
            found[group].append(Strike(at_s, tuple(own), silent, room_s))
    return found
