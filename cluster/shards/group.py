"""Shards that serve one replica: started, watched, brought back. The replica's Executor.

    with ShardGroup(job) as group:
        engine = Engine(group, ...)

A thread watches and repairs; the engine's thread runs steps, and gets CacheLost for those that a
lost shard took along. What to do when is decided in supervisor.py; here it is done.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from torch import Tensor

from cluster.coordinator_actor import coordinating
from cluster.messages import (
    Topology,
)
from gptmoe.errors import ClusterError, Unavailable
from gptmoe.generate.executor import CacheLost
from gptmoe.generate.plan import StepPlan
from gptmoe.shard.parts import layout_of

from . import supervisor
from .actors import Actors
from .executor import ShardsExecutor
from .muster import GroupJob, Muster

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
BEAT_AFTER_S = 3.0
"""An idle group gets a sign of life so often: its calls would else run into their timeout."""
FRESH_S = 1.5
"""Only shards heard of so lately get one: with a frozen one it would hang."""
BLIND_S = 10.0
"""A supervisor that fails for longer is given up."""
DEATH_KNOWN_S = 0.5
"""A socket says at once that its other end is gone, Ray within so long that a process has died."""
LOOK_AGAIN_S = 0.1
"""The engine's thread waits so long for shards that are away before it hears its callers again."""


class ShardGroup:
    """The actors of one replica. Invariant: `_live` is None whenever a shard is away."""

    def __init__(self, job: GroupJob) -> None:
        self.job = job
        self.recoveries: list[dict[str, Any]] = []
        """Of each: the reason, the moment it began (time.monotonic), seconds of its phases."""
        self._state = supervisor.State()
        self._live: ShardsExecutor | None = None
        self._filled: ShardsExecutor | None = None  # whose cache the engine counts on
        self._changed = threading.Condition()
        self._in_use = threading.Lock()
        self._refreshing = threading.Lock()
        self._wanted: tuple[int, ...] = ()  # versions of weights to keep; () = no wish
        self._step_began_s: float | None = None
        self._used_s = time.monotonic()
        self._failure = ""
        self._blind_since_s: float | None = None
        self._stopped = threading.Event()
        self._stack = ExitStack()
        self._actors = Actors(job.parts, job.run, job.num_cpus, job.threads, job.cache_dir)

    def __enter__(self) -> "ShardGroup":
        """Start all shards; ClusterError if there is no room or one cannot load its part."""
        try:
            coordinator = self._stack.enter_context(coordinating(self.job.run, None))
            self._muster = Muster(self.job, self._actors, coordinator)
            self._stack.callback(self._muster.leave)
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
        with suppress(ClusterError):  # without a coordinator: they are killed all the same
            self._muster.drain()
        self._stack.close()

    @property
    def banks(self) -> int:
        """See Executor.banks: each data rank has slots of its own."""
        return layout_of(self.job.parts).dp

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """See Executor.run."""
        with self._changed:
            if self._live is None:
                self._changed.wait(LOOK_AGAIN_S)
            live = self._live
        if live is None:
            self._give_up()
        if live is None or self._filled not in (None, live):  # they came back while nobody asked
            self._filled = None
            raise CacheLost(self._muster.job.version)
        self._filled = live
        try:
            with self._in_use:
                self._step_began_s = time.monotonic()
                return live.run(plan, tokens)
        except ClusterError as error:
            self._lost(live, str(error))
            self._filled = None
            raise CacheLost(self._muster.job.version) from None
        finally:
            self._step_began_s, self._used_s = None, time.monotonic()

    def keep(self, versions: Set[int]) -> None:
        """See Executor.keep; done by the supervisor's thread, soon."""
        self._wanted = tuple(sorted(versions))

    def refresh(self, checkpoint: str, version: int) -> None:
        """Read newer weights of the same config beside the old ones, on all shards. Steps may use
        either from now on, and shards that start later read the new ones.

        Raises ClusterError if a shard refuses, and Unavailable while one is away; nothing changes.
        """
        live = self._live
        if live is None:
            raise Unavailable("a shard is away; refresh the weights once it is back", 10.0)
        with self._refreshing:
            self._muster.refresh(checkpoint, version, lambda: self._live is not live)

    def check(self) -> None:
        """Raise ClusterError if nobody watches over the shards: the replica must be replaced."""
        since_s = self._blind_since_s
        if since_s is not None and time.monotonic() - since_s > BLIND_S:
            raise ClusterError(
                f"for over {BLIND_S:g} s nobody has watched over this replica's shards (their "
                "coordinator may be lost); restart the replica"
            )

    def topology(self) -> Topology:
        """Who owns what, and when it was last heard of."""
        return self._muster.topology()

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
                self._blind_since_s = None
            except Exception:
                log.exception("supervisor fails")
                self._blind_since_s = self._blind_since_s or time.monotonic()

    def _look(self) -> supervisor.Recover | None:
        now_s, limits = time.monotonic(), self.job.limits
        if self._state.phase == "resting":
            self._state, todo = supervisor.tick(self._state, now_s)
            return todo
        dead = tuple(self._actors.dead(DEATH_KNOWN_S if self._failure else 0.0))
        if dead or self._failure:
            reason = f"rank {', '.join(map(str, dead))} died" if dead else self._failure
            self._state, todo = supervisor.failed(self._state, reason, now_s, limits, dead)
            return todo
        ages_s = {owner.rank: owner.heartbeat_age_s for owner in self.topology().owners}
        busy = self._step_began_s is not None
        self._state, todo = supervisor.beats(self._state, ages_s, now_s, limits, busy=busy)
        if todo is None and self._live is not None:
            self._upkeep(self._live, fresh=max(ages_s.values(), default=0.0) < FRESH_S)
        return todo

    def _misses_one(self) -> bool:
        """Whether a step waits for a shard that is silent for too long."""
        oldest_s = max((owner.heartbeat_age_s for owner in self.topology().owners), default=0.0)
        return self._step_began_s is not None and oldest_s > self.job.limits.silent_s

    def _upkeep(self, live: ShardsExecutor, *, fresh: bool) -> None:
        if self._wanted and self._refreshing.acquire(blocking=False):
            try:
                wanted, self._wanted = self._wanted, ()
                self._muster.keep(wanted, self._misses_one)
            finally:
                self._refreshing.release()
        if fresh and time.monotonic() - self._used_s > BEAT_AFTER_S:
            self._beat(live)

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
        began_s = time.monotonic()
        try:
            phases = self._bring_up(todo.suspects, todo.reason)
            self.recoveries.append({"reason": todo.reason, "began_s": began_s, **phases})
            log.warning("shards are back phases=%s", phases)
        except ClusterError as error:
            log.warning("shards do not come back: %s", error)
            self._state, again = supervisor.failed(
                self._state, str(error), time.monotonic(), self.job.limits
            )
            if again is not None:
                self._recover(again)

    def _bring_up(self, suspects: Sequence[int] = (), reason: str = "") -> dict[str, float]:
        live, phases = self._muster.bring_up(suspects, reason)
        self._state = supervisor.started(self._state)
        self._set_live(live)
        return phases
