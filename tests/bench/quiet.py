"""Rounds on a quiet machine: several things in turns, again where somebody else used the processor.

    rounds = measure([Contestant("ours", step), Contestant("theirs", other)], rounds=9)
    print(median(rounds.seconds["ours"]), rounds.bandwidth, rounds.other)

Every round also reads memory as fast as it can (`read_bandwidth`), since decoding at batch 1 is
reading weights: what the machine gave in that very round is what figures are to be held against.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

MOST_OTHER = 0.04
"""A round is repeated if other processes had more than this share of the machine."""
TRIES = 4
"""Rounds in all are at most so many times those wanted; then a noisy one counts, and is told."""
STREAM_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Contestant:
    """`act` returns the seconds that count, which may be a part of what it takes."""

    name: str
    act: Callable[[], float]
    pid: int = 0
    """The process that computes, if it is not this one."""


@dataclass(slots=True)
class Rounds:
    """What was measured, round by round."""

    seconds: dict[str, list[float]]
    bandwidth: list[float] = field(default_factory=list)
    """Bytes read per second."""
    other: list[float] = field(default_factory=list)
    """Share of the machine that others had; rounds that were thrown away are not here."""
    repeated: int = 0

    def median_ms(self, name: str) -> float:
        """The middle round's."""
        return 1e3 * statistics.median(self.seconds[name])

    def spread_ms(self, name: str) -> tuple[float, float]:
        """The middle half of the rounds."""
        low, _, high = statistics.quantiles(self.seconds[name], n=4, method="inclusive")
        return 1e3 * low, 1e3 * high

    def times_faster(self, name: str, than: str) -> float:
        """The ratio of the middle round: both were measured in each, one after the other."""
        pairs = zip(self.seconds[than], self.seconds[name], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def measure(contestants: Sequence[Contestant], *, rounds: int = 9, warmups: int = 1) -> Rounds:
    """Let all act in each round, another one first each time."""
    found = Rounds({contestant.name: [] for contestant in contestants})
    pids = {contestant.pid for contestant in contestants if contestant.pid}
    for contestant in list(contestants) * warmups:
        contestant.act()
    read_bandwidth()
    number = 0
    while len(found.other) < rounds:
        first = number % len(contestants)
        watch = Watch(pids)
        seconds = {c.name: c.act() for c in [*contestants[first:], *contestants[:first]]}
        bandwidth, other = read_bandwidth(), watch.other()
        number += 1
        if other > MOST_OTHER and number <= rounds * (TRIES - 1):
            found.repeated += 1
            continue
        found.bandwidth.append(bandwidth)
        found.other.append(other)
        for name, value in seconds.items():
            found.seconds[name].append(value)
    return found


class Watch:
    """Who uses the processors from now on."""

    def __init__(self, pids: set[int]) -> None:
        self._pids = pids | {os.getpid()}
        self._began_s = time.perf_counter()
        self._busy, self._own = _busy_s(), self._own_s()

    def other(self) -> float:
        """The share of the machine that neither this process nor those named had, steal included.

        The clock of the kernel ticks 100 times a second: good for rounds of half a second and more.
        """
        room_s = (time.perf_counter() - self._began_s) * (os.cpu_count() or 1)
        other_s = (_busy_s() - self._busy) - (self._own_s() - self._own)
        return max(0.0, other_s / room_s)

    def _own_s(self) -> float:
        return sum(map(_process_s, self._pids))


def read_bandwidth() -> float:
    """Bytes per second that all threads read together: the best of three passes."""
    numbers = torch.zeros(STREAM_BYTES // 8, dtype=torch.int64)
    best_s = min(_seconds(numbers.sum) for _ in range(3))
    return STREAM_BYTES / best_s


def triad_bandwidth() -> float:
    """STREAM's triad, a = b + 3 c, as STREAM counts it: three times the bytes of one array."""
    size = STREAM_BYTES // 8
    a, b, c = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    best_s = min(_seconds(lambda: torch.add(b, c, alpha=3, out=a)) for _ in range(3))
    return 3 * STREAM_BYTES / best_s


def _seconds(act: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s


def _busy_s() -> float:
    """Seconds that all processors together have worked: all but idle and iowait."""
    words = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    ticks = [int(word) for word in words]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _process_s(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
