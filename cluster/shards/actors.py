"""The Ray side of a group of shards: room for them, their actors, calls to them."""

import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import coordinator_actor, env
from cluster.messages import Owner
from cluster.resources import missing
from gptmoe.errors import ClusterError
from gptmoe.shard.parts import Part

from .shard_actor import ShardActor

log = logging.getLogger(__name__)

CONTROL_THREADS = 5
"""Calls that an actor takes at once: a command that hangs must not keep the next from being heard,
and one call never returns (ShardActor.live)."""


class Actors:
    """The actors of one group by rank, in placement groups of their own: one bundle a rank.

    Attention ranks are packed, so that tensor groups share a node if they can; ranks of experts
    alone are spread, so that copies of an expert do not die together.
    """

    def __init__(
        self, parts: Sequence[Part], run: str, num_cpus: float, threads: int, cache_dir: str
    ) -> None:
        self._parts, self._run, self._cache_dir = parts, run, cache_dir
        self._num_cpus, self._threads = num_cpus, threads
        self._actors: dict[int, Any] = {}
        self._lives: dict[int, Any] = {}
        self._groups: dict[bool, PlacementGroup] = {}

    def make_room(self, within_s: float) -> None:
        """Reserve a bundle a rank. Raises ClusterError, saying what is missing, if there is none in
        time."""
        deadline_s = time.monotonic() + within_s
        for alone, strategy in ((False, "PACK"), (True, "SPREAD")):
            ranks = self._ranks(alone)
            if not ranks:
                continue
            bundles = [{"CPU": self._num_cpus} for _ in ranks]
            name = f"gptmoe:{self._run}:{'experts' if alone else 'attention'}"
            group = placement_group(bundles, strategy=strategy, name=name)
            self._groups[alone] = group
            if not group.wait(max(0.1, deadline_s - time.monotonic())):
                raise ClusterError(self._no_room(len(self._parts), within_s))

    def start(self, rank: int) -> None:
        """A new actor for a rank, in its bundle; it may still wait for a node."""
        part = self._parts[rank]
        alone = part.experts_only
        index = self._ranks(alone).index(rank)
        options = {
            "num_cpus": self._num_cpus,
            "max_concurrency": CONTROL_THREADS,
            "max_restarts": 0,
            "name": f"gptmoe-shard:{self._run}:{rank}:{time.monotonic_ns()}",
            "namespace": coordinator_actor.NAMESPACE,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._groups[alone], index),
            "runtime_env": {"env_vars": env.worker_environment(self._threads, use_gpu=False)},
        }
        kind: Any = ray.remote(ShardActor).options(**options)
        self._actors[rank] = actor = kind.remote(
            partial(coordinator_actor.channel, self._run), self._cache_dir
        )
        self._lives[rank] = actor.live.remote()

    def kill(self, rank: int, owner: Owner | None = None) -> None:
        """End a rank's actor at once. One that is frozen takes Ray 7 s, unless `owner` says that it
        is a process of this machine."""
        actor = self._actors.pop(rank, None)
        self._lives.pop(rank, None)
        if actor is not None:
            if owner is not None and owner.node == socket.gethostname() and _is_shard(owner.pid):
                with suppress(ProcessLookupError):
                    os.kill(owner.pid, signal.SIGKILL)
            ray.kill(actor)

    def dead(self, within_s: float = 0.0) -> list[int]:
        """Ranks whose process has ended; waits up to `within_s` for the first."""
        lives = list(self._lives.values())
        if lives and within_s:
            ray.wait(lives, num_returns=1, timeout=within_s)
        ended = _ended(lives, 0)
        return [rank for rank, life in self._lives.items() if life in ended]

    def known(self) -> list[int]:
        """Ranks that have an actor, alive or not."""
        return sorted(self._actors)

    def send(self, rank: int, data: bytes) -> Any:
        """See Post.send; None for a rank without an actor."""
        actor = self._actors.get(rank)
        return None if actor is None else actor.handle.remote(data)

    def wait(self, calls: Mapping[int, Any], within_s: float) -> bool:
        """See Post.wait."""
        under_way = [call for call in calls.values() if call is not None]
        return len(_ended(under_way, within_s)) == len(under_way)

    def collect(self, calls: Mapping[int, Any]) -> dict[int, bytes | None]:
        """See Post.collect."""
        done = _ended([call for call in calls.values() if call is not None], 0)
        return {rank: _result(call) if call in done else None for rank, call in calls.items()}

    def stop(self) -> None:
        """End all actors and give their room back."""
        for rank in self.known():
            self.kill(rank)
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()

    def _ranks(self, alone: bool) -> list[int]:
        return [rank for rank, part in enumerate(self._parts) if part.experts_only == alone]

    def _no_room(self, ranks: int, within_s: float) -> str:
        lack = missing({"CPU": ranks * self._num_cpus}, ray.cluster_resources())
        why = f"the cluster lacks {lack}" if lack else "other work holds the CPUs"
        return (
            f"no room for {ranks} shards of {self._num_cpus:g} CPU each after {within_s:g} s: "
            f"{why}; add nodes, stop other work, or use a smaller layout"
        )


def _ended(calls: Sequence[Any], within_s: float) -> Sequence[Any]:
    """Those of the calls that have ended, once all have or after so long."""
    if not calls:
        return []
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=within_s)
    return list(done)


def _is_shard(pid: int) -> bool:
    """Whether a process of this machine is a shard's: numbers are used again."""
    try:
        return ShardActor.__name__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _result(call: Any) -> bytes | None:
    try:
        return bytes(ray.get(call, timeout=1.0))
    except ray.exceptions.RayError as error:
        log.info("shard lost: %s", error)
        return None
