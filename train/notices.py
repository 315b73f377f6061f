"""Reasons to save and start the workers again, which all ranks must agree on: asked at each step.

    notices = Notices(mesh, device, config.run, told=lambda: ...)
    if reason := notices(): ...

Inside a step a slow worker is hidden: the others wait for it in collectives, and all steps take as
long as its own. So now and then each rank times the same small piece of work, and the times are
compared.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from gptmoe.parallel.mesh import Mesh

from .config import RunConfig

PROBES, FEWEST = 12, 3
"""So many in the time for which a worker must be slow, or as steps allow, but no fewer."""
REST_S = 3600.0
"""After workers were started again for one's sake nobody is compared: the cause may be for ever."""
MARK = "slow"
_WIDTH, _PRODUCTS = 384, 20


class Notices:
    """One rank's side. `told()` says whether Ray announced the end of this rank's node."""

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        run: RunConfig,
        *,
        told: Callable[[], bool] = lambda: False,
        probe: Callable[[torch.device], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mesh, self._device, self._run = mesh, device, run
        self._told = told
        self._probe = probe or product_seconds
        self._clock = clock
        self._next_at_s = clock()
        self._slow: list[tuple[int, float]] = []
        self._slow_since_s = 0.0

    def __call__(self) -> str:
        """Why the workers are to start again, or nothing. Collective; the same on every rank."""
        told, due = self._mesh.gather([float(self._told()), float(self._is_due())]).unbind(1)
        if told.any():
            return "a node is about to go"
        return self._compare() if due.any() else ""

    def _is_due(self) -> bool:
        """Rank 0 says when: clocks differ, and all must take part."""
        run = self._run
        if self._mesh.rank or self._mesh.layout.world == 1 or not run.slow_factor:
            return False
        if self._clock() < self._next_at_s or _age_s(run.dir / MARK) < REST_S:
            return False
        self._next_at_s = self._clock() + run.slow_s / PROBES
        return True

    def _compare(self) -> str:
        seconds, clocks = self._mesh.gather([self._probe(self._device), self._clock()]).unbind(1)
        now_s = float(clocks[0])  # rank 0's, for all
        slow = slow_rank(seconds.tolist(), self._run.slow_factor)
        if slow is None or (self._slow and self._slow[-1][0] != slow[0]):
            self._slow.clear()
        if slow is None:
            return ""
        if not self._slow:
            self._slow_since_s = now_s
        self._slow.append(slow)
        if len(self._slow) < FEWEST or now_s - self._slow_since_s < self._run.slow_s:
            return ""
        if self._mesh.rank == 0:
            with suppress(OSError):  # a full disk is told of elsewhere
                (self._run.dir / MARK).touch()
        rank, factor = self._slow[-1][0], statistics.median(times for _, times in self._slow)
        return (
            f"worker {rank} is slow: for {self._run.slow_s:g} s its products have taken "
            f"{factor:.1f} times as long as the others'"
        )


def slow_rank(seconds: Sequence[float], factor: float) -> tuple[int, float] | None:
    """The slowest rank and how many times as long as the median of the others it takes, if that is
    `factor` or more."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median([*seconds[:slowest], *seconds[slowest + 1 :]])
    times = seconds[slowest] / others
    return (slowest, times) if times >= factor else None


def product_seconds(device: torch.device) -> float:
    """Time of small products on the device that a rank computes with.

    Of all together: a core that is shared is lost for many milliseconds, and then whole again.
    """
    x = torch.ones(_WIDTH, _WIDTH, device=device)
    _wait(device)
    began_s = time.perf_counter()
    for _ in range(_PRODUCTS):
        x @ x
    _wait(device)
    return time.perf_counter() - began_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return float("inf")
