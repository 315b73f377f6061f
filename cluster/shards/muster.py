"""One epoch's start: end what is silent, see who is there, replace, load, meet."""

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import ray.util
import torch
import torch.distributed as dist

from cluster.coordinator_actor import ActorChannel
from cluster.messages import (
    Begin,
    Begun,
    Drain,
    Failure,
    Join,
    Keep,
    Load,
    Plan,
    Refresh,
    Topology,
    TopologyRequest,
)
from gptmoe.errors import ClusterError, Unavailable
from gptmoe.shard.parts import Part

from . import links, supervisor
from .actors import Actors
from .executor import ShardsExecutor
from .orders import Answers, order
from .roles import message_of

PLAN_S = 5.0
"""A shard that is alive answers Plan at once, whatever it computes."""
MEET_S = 20.0
RESTART_S = 60.0
"""A shard that starts again gets so long, then another try: it may hang before it can be missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupJob:
    """What a group is to serve."""

    run: str
    """Its name on the cluster, for status and actors."""
    parts: tuple[Part, ...]
    checkpoint: str
    """A folder that all nodes have, or a URI, which each fetches into `cache_dir`."""
    config_digest: str
    dtype: str
    vocab_size: int
    slots: int
    num_cpus: float
    """That each shard asks Ray for."""
    threads: int
    """That it computes with."""
    version: int = 0
    """Of the weights."""
    cache_dir: str = "~/.cache/gptmoe"
    start_s: float = 120.0
    """Room, actors and weights get so long."""
    group_timeout_s: float = 10.0
    limits: supervisor.Limits = field(default_factory=supervisor.Limits)


class Muster:
    """Brings the shards of one group together, at first and after each loss."""

    def __init__(self, job: GroupJob, actors: Actors, coordinator: ActorChannel) -> None:
        self.job, self.coordinator = job, coordinator
        self._actors = actors
        self._store: Any = None  # lives as long as its epoch
        self._line: links.Links | None = None  # and so does this
        self._epoch = 0
        self._sent: dict[int, int] = {}  # commands of this epoch that each rank has carried out

    def topology(self) -> Topology:
        """Who owns what, and when it was last heard of."""
        answer = self.coordinator.ask(TopologyRequest())
        assert isinstance(answer, Topology)
        return answer

    def bring_up(
        self, suspects: Sequence[int] = (), reason: str = ""
    ) -> tuple[ShardsExecutor, dict[str, float]]:
        """Kill the suspects, and all who do not answer; start what is missing; load; meet.

        Shards that are alive keep their weights. Returns the engine's way to them, and the seconds
        of each phase. Raises ClusterError: try again.
        """
        clock = _Phases()
        owners = {owner.rank: owner for owner in self.topology().owners}
        for rank in suspects:
            self._actors.kill(rank, owners.get(rank))
        self.leave()  # before the shards are asked to: some wait for a word from here
        for rank in self._silent():
            self._actors.kill(rank, owners.get(rank))
        clock.end("leave_s")
        missing = sorted(set(range(len(self.job.parts))) - set(self._actors.known()))
        epoch, plan = self._new_epoch()
        if reason:
            self._report(epoch, f"{reason}; started again: {_ranks(missing)}")
        for rank in missing:
            self._actors.start(rank)
        start_s = self.job.start_s if self._epoch == 0 else min(self.job.start_s, RESTART_S)
        self._order(plan, start_s, "a shard's start")
        clock.end("start_s")
        self._order(lambda _: Load(epoch=epoch, sequence=2), self.job.start_s, "loading")
        clock.end("load_s")
        live = self._meet(epoch)
        clock.end("meet_s")
        self._epoch, self._sent = epoch, dict.fromkeys(range(len(self.job.parts)), 3)
        return live, clock.phases

    def refresh(self, checkpoint: str, version: int, changed: Callable[[], bool]) -> None:
        """All shards read newer weights beside the old; `changed` says when these shards are not
        together any more. Raises ClusterError, nothing is changed then."""

        def command(rank: int) -> Refresh:
            return Refresh(
                epoch=self._epoch,
                sequence=self._sent[rank] + 1,
                checkpoint=checkpoint,
                version=version,
            )

        answers = order(self._actors, list(self._sent), command, self.job.start_s, changed)
        if changed():
            raise Unavailable("a shard was lost; refresh the weights once it is back", 10.0)
        self._count(answers)
        if answers.refusals or answers.lost:
            self.keep((self.job.version,))
            answers.check("refreshing")
        self.job = replace(self.job, checkpoint=checkpoint, version=version)

    def keep(self, versions: tuple[int, ...], hopeless: Callable[[], bool] = lambda: False) -> None:
        """All shards let go of all weights but these versions. Not waited for when it has become
        `hopeless`: a shard is lost."""

        def command(rank: int) -> Keep:
            return Keep(epoch=self._epoch, sequence=self._sent[rank] + 1, versions=versions)

        # Who is lost will be missed elsewhere.
        self._count(order(self._actors, list(self._sent), command, PLAN_S, hopeless))

    def drain(self) -> None:
        """All shards leave their groups and take no more steps, as far as they can."""

        def command(rank: int) -> Drain:
            return Drain(epoch=self._epoch, sequence=self._sent[rank] + 1)

        self.leave()
        order(self._actors, list(self._sent), command, PLAN_S, self._somebody_lost)

    def leave(self) -> None:
        """Leave the shards, if they are met: steps that wait for them fail at once."""
        links.leave(self._line)
        self._line = None

    def _count(self, answers: Answers) -> None:
        """Ranks that failed at a command count for themselves."""
        for rank in answers.ready:
            self._sent[rank] += 1

    def _silent(self) -> list[int]:
        """Ranks whose actors do not answer, or cannot leave their groups. All others have left."""
        known = self._actors.known()
        _, plan = self._new_epoch()
        answers = order(self._actors, known, plan, PLAN_S) if known else None
        return sorted({*answers.lost, *answers.refusals}) if answers else []

    def _new_epoch(self) -> tuple[int, Callable[[int], Plan]]:
        """The next epoch, and its plan by rank."""
        group = uuid.uuid4().hex
        answer = self.coordinator.ask(Begin(group=group))
        assert isinstance(answer, Begun)
        job, epoch = self.job, answer.epoch
        shards = tuple(message_of(part) for part in job.parts)

        def plan(rank: int) -> Plan:
            return Plan(
                epoch=epoch,
                sequence=1,
                rank=rank,
                shards=shards,
                checkpoint=job.checkpoint,
                version=job.version,
                config_digest=job.config_digest,
                dtype=job.dtype,
                slots=job.slots,
                threads=job.threads,
                group=group,
            )

        return epoch, plan

    def _order(self, command: Callable[[int], Any], within_s: float, what: str) -> None:
        ranks = range(len(self.job.parts))
        order(self._actors, ranks, command, within_s, self._somebody_lost).check(what)

    def _somebody_lost(self) -> bool:
        """Whether a shard has died, or has fallen silent after it registered."""
        ages_s = [owner.heartbeat_age_s for owner in self.topology().owners]
        silent = max(ages_s, default=0.0) > self.job.limits.idle_silent_s
        return silent or bool(self._actors.dead())

    def _report(self, epoch: int, reason: str) -> None:
        self.coordinator.ask(Failure(epoch=epoch, reason=reason, goes_on=True))

    def _meet(self, epoch: int) -> ShardsExecutor:
        """All make the groups of a new store at the same time, this process as the last rank."""
        job, host = self.job, ray.util.get_node_ip_address()
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            host, 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=MEET_S)
        )
        port, timeout_s = self._store.port, job.group_timeout_s
        join = Join(epoch=epoch, sequence=3, host=host, port=port, timeout_s=timeout_s)

        def meet() -> None:
            world = len(job.parts)
            _, self._line = links.meet(host, port, job.parts, world, timeout_s, within_s=MEET_S)

        me = threading.Thread(target=meet, daemon=True)
        me.start()
        self._order(lambda _: join, 2 * MEET_S, "meeting")
        me.join(MEET_S)
        if self._line is None:
            raise ClusterError("the engine did not meet its shards")
        dtype = getattr(torch, job.dtype)
        return ShardsExecutor(job.parts, self._line, epoch, job.vocab_size, dtype)


def _ranks(ranks: Sequence[int]) -> str:
    return "rank " + ", ".join(map(str, ranks)) if ranks else "none"


class _Phases:
    """Seconds of one thing after the other."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._since_s = time.monotonic()

    def end(self, name: str) -> None:
        """The phase of this name ends now."""
        now_s = time.monotonic()
        self.phases[name], self._since_s = round(now_s - self._since_s, 3), now_s
