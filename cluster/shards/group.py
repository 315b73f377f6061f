"""Shards that serve one replica: started, watched, brought back. The replica's Executor.

    with ShardGroup(job) as group:
        engine = Engine(group, ...)

A thread watches and repairs; the engine's thread runs steps, and gets CacheLost for those that a
lost shard took along. What to do when is decided in supervisor.py; here it is done.
"""

import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import ray.util
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.coordinator_actor import coordinating
from cluster.messages import (
    Begin,
    Begun,
    ExpertRange,
    Failure,
    Join,
    Load,
    Plan,
    Topology,
    TopologyRequest,
)
from cluster.messages import Shard as ShardMessage
from gptmoe.errors import ClusterError, Unavailable
from gptmoe.generate.executor import CacheLost
from gptmoe.generate.scheduler import StepPlan
from gptmoe.shard.parts import Part

from . import links, supervisor
from .actors import Actors
from .executor import ShardsExecutor
from .orders import order

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
BEAT_AFTER_S = 3.0
"""An idle group gets a sign of life so often: its calls would else run into their timeout."""
LOOK_AGAIN_S = 0.1
"""The engine's thread waits so long for shards that are away before it hears its callers again."""
PLAN_S = 2.0
"""A shard that is alive answers Plan at once, whatever it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupJob:
    """What a group is to serve."""

    run: str
    """Its name on the cluster, for status and actors."""
    parts: tuple[Part, ...]
    checkpoint: str
    version: int
    config_digest: str
    dtype: str
    vocab_size: int
    slots: int
    num_cpus: float
    """That each shard asks Ray for."""
    threads: int
    """That it computes with."""
    start_s: float = 120.0
    """Room, actors and weights get so long."""
    group_timeout_s: float = 10.0
    limits: supervisor.Limits = field(default_factory=supervisor.Limits)


class ShardGroup:
    """The actors of one replica. Invariant: `_live` is None whenever a shard is away."""

    def __init__(self, job: GroupJob) -> None:
        self.job = job
        self.recoveries: list[dict[str, Any]] = []
        """Of each: the reason, and seconds of its phases."""
        self._state = supervisor.State()
        self._live: ShardsExecutor | None = None
        self._store: Any = None
        self._changed = threading.Condition()
        self._in_use = threading.Lock()
        self._step_began_s: float | None = None
        self._used_s = time.monotonic()
        self._failure = ""
        self._stopped = threading.Event()
        self._stack = ExitStack()
        self._actors = Actors(job.parts, job.run, job.num_cpus, job.threads)

    def __enter__(self) -> "ShardGroup":
        """Start all shards; ClusterError if there is no room or one cannot load its part."""
        try:
            self._coordinator = self._stack.enter_context(coordinating(self.job.run, None))
            self._stack.callback(links.leave)
            self._stack.callback(self._actors.stop)
            self._actors.make_room(self.job.start_s)
            self._bring_up()
        except BaseException:
            self._stack.close()
            raise
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End everything that was started."""
        self._stopped.set()
        self._thread.join(5.0)
        self._set_live(None)
        self._stack.close()

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """See Executor.run."""
        with self._changed:
            if self._live is None:
                self._changed.wait(LOOK_AGAIN_S)
            live = self._live
        if live is None:
            self._give_up()
            raise CacheLost
        try:
            with self._in_use:
                self._step_began_s = time.monotonic()
                return live.run(plan, tokens)
        except ClusterError as error:
            self._lost(live, str(error))
            raise CacheLost from None
        finally:
            self._step_began_s, self._used_s = None, time.monotonic()

    def topology(self) -> Topology:
        """Who owns what, and when it was last heard of."""
        answer = self._coordinator.ask(TopologyRequest())
        assert isinstance(answer, Topology)
        return answer

    @property
    def costs(self) -> Mapping[str, float]:
        """What the steps of this epoch cost, in seconds."""
        live = self._live
        return asdict(live.costs) if live else {}

    def _give_up(self) -> None:
        state, limits = self._state, self.job.limits
        after_s = supervisor.gives_up(state, time.monotonic(), limits)
        if after_s is not None:
            raise Unavailable(
                f"a shard of this model is away for over {limits.wait_s:g} s ({state.reason}); "
                f"try again in {after_s:.0f} s",
                after_s,
            )

    def _lost(self, live: ShardsExecutor, reason: str) -> None:
        with self._changed:
            if self._live is live:
                self._live, self._failure = None, reason

    def _set_live(self, live: ShardsExecutor | None) -> None:
        with self._changed:
            self._live, self._failure = live, ""
            self._changed.notify_all()

    # --- the supervisor's thread ----------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_EVERY_S):
            try:
                todo = self._look()
                if todo is not None:
                    self._recover(todo)
            except Exception:
                log.exception("supervisor fails")

    def _look(self) -> supervisor.Recover | None:
        now_s, limits = time.monotonic(), self.job.limits
        if self._state.phase == "resting":
            self._state, todo = supervisor.tick(self._state, now_s)
            return todo
        if self._live is not None and now_s - self._used_s > BEAT_AFTER_S:
            self._beat(self._live)
        if self._failure:
            self._state, todo = supervisor.failed(self._state, self._failure, now_s, limits)
            return todo
        ages_s = {owner.rank: owner.heartbeat_age_s for owner in self.topology().owners}
        busy = self._step_began_s is not None
        self._state, todo = supervisor.beats(self._state, ages_s, now_s, limits, busy=busy)
        return todo

    def _beat(self, live: ShardsExecutor) -> None:
        if not self._in_use.acquire(blocking=False):
            return
        try:
            self._step_began_s = time.monotonic()
            live.beat()
        except ClusterError as error:
            self._lost(live, str(error))
        finally:
            self._step_began_s, self._used_s = None, time.monotonic()
            self._in_use.release()

    def _recover(self, todo: supervisor.Recover) -> None:
        log.warning("shards recover reason=%s suspects=%s", todo.reason, todo.suspects)
        self._set_live(None)
        try:
            phases = self._bring_up(todo.suspects, todo.reason)
            self.recoveries.append({"reason": todo.reason, **phases})
            log.warning("shards are back phases=%s", phases)
        except ClusterError as error:
            log.warning("shards do not come back: %s", error)
            self._state, again = supervisor.failed(
                self._state, str(error), time.monotonic(), self.job.limits
            )
            if again is not None:
                self._recover(again)

    def _bring_up(self, suspects: Sequence[int] = (), reason: str = "") -> dict[str, float]:
        """One epoch's start: kill, plan, replace, load, meet. Raises ClusterError."""
        clock = _Phases()
        ranks = range(len(self.job.parts))
        owners = {owner.rank: owner for owner in self.topology().owners}
        for rank in suspects:
            self._actors.kill(rank, owners.get(rank))
        epoch, group = self._begin()
        known = self._actors.known()
        answers = order(self._actors, known, self._plans(epoch, group), PLAN_S)
        lost = {*answers.lost, *answers.refusals}
        with self._in_use:  # whoever ran a step has failed by now: its peers have left
            links.leave()
        clock.end("leave_s")
        new = sorted(set(ranks) - set(known) | lost)
        if reason:
            away = ", ".join(map(str, new)) or "none"
            text = f"{reason}; shards started again: {away}"
            self._coordinator.ask(Failure(epoch=epoch - 1, reason=text))
        for rank in new:
            self._actors.kill(rank, owners.get(rank))
            self._actors.start(rank)
        start_s = self.job.start_s
        order(self._actors, new, self._plans(epoch, group), start_s).check("a shard's start")
        clock.end("start_s")
        loads = order(self._actors, ranks, lambda rank: Load(epoch=epoch, sequence=2), start_s)
        loads.check("loading")
        clock.end("load_s")
        live = self._meet(epoch)
        clock.end("meet_s")
        self._state = supervisor.started(self._state)
        self._set_live(live)
        return clock.phases

    def _begin(self) -> tuple[int, str]:
        group = uuid.uuid4().hex
        answer = self._coordinator.ask(Begin(group=group))
        assert isinstance(answer, Begun)
        return answer.epoch, group

    def _plans(self, epoch: int, group: str) -> Any:
        job = self.job
        shards = tuple(_message(part) for part in job.parts)
        return lambda rank: Plan(
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

    def _meet(self, epoch: int) -> ShardsExecutor:
        job, ranks = self.job, range(len(self.job.parts))
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            host, 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        port = self._store.port
        join = Join(epoch=epoch, sequence=3, host=host, port=port, timeout_s=job.group_timeout_s)
        mine: list[links.Groups] = []
        me = threading.Thread(target=lambda: mine.append(self._my_groups(host, port)), daemon=True)
        me.start()
        order(self._actors, ranks, lambda rank: join, 30.0).check("meeting")
        me.join(30.0)
        if not mine:
            raise ClusterError("the engine did not meet its shards")
        dtype = getattr(torch, job.dtype)
        line = links.Links(mine[0].everyone)
        return ShardsExecutor(job.parts, line, epoch, job.vocab_size, dtype)

    def _my_groups(self, host: str, port: int) -> links.Groups:
        job = self.job
        return links.meet(host, port, job.parts, len(job.parts), job.group_timeout_s, within_s=20.0)


class _Phases:
    """Seconds of one thing after the other."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._since_s = time.monotonic()

    def end(self, name: str) -> None:
        """The phase of this name ends now."""
        now_s = time.monotonic()
        self.phases[name], self._since_s = round(now_s - self._since_s, 3), now_s


def _message(part: Part) -> ShardMessage:
    return ShardMessage(
        stage=part.stage,
        layers=part.layers,
        slice=part.slice,
        slices=part.slices,
        experts=tuple(ExpertRange(layer=e.layer, first=e.first, end=e.end) for e in part.experts),
        data=part.data,
        experts_only=part.experts_only,
    )
