"""A group of shards on a clock that a model moves: what they would wait for is a sum here.

The muster, its orders, the supervisor, the executor and its routes are the real ones. Replaced are
Ray (`ranks.Actors`), torch.distributed (`_Line`) and the store (`_Muster._meet`).
"""

import random
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cluster import wire
from cluster.coordinator_actor import ActorChannel
from cluster.messages import Join, Message, Step, StepDone
from cluster.shards import actors as real_actors
from cluster.shards import member, supervisor
from cluster.shards.executor import ShardsExecutor
from cluster.shards.group import LOOK_AGAIN_S, LOOK_EVERY_S
from cluster.shards.muster import MEET_S, GroupJob, Muster
from cluster.shards.pulse import BEAT_EVERY_S
from cluster.shards.routes import route_of
from cluster.shards.split import pieces
from gptmoe.errors import ClusterError, Unavailable
from gptmoe.generate.executor import CacheLost
from gptmoe.generate.plan import StepPlan

from .failures import Phases, Strike
from .ranks import Actors, Channel, Clock
from .timing import Replica, work_of
from .words import VOCAB


@dataclass(slots=True)
class Recovery:
    """One loss, in seconds."""

    lost_at_s: float
    detect_s: float = 0.0
    back_s: float = 0.0
    """From the first look at the loss until all shards have met."""
    moving_s: float = 0.0
    """From the loss until the next token."""
    attempts: int = 0


class _Line:
    """Headers as bytes to each rank, scores back: the data plane of one epoch."""

    def __init__(self, actors: Actors) -> None:
        self._actors, self._parts = actors, actors.replica.parts
        self._routes = [route_of(self._parts, rank) for rank in range(len(self._parts))]
        self._done: dict[int, deque[bytes]] = {rank: deque() for rank in range(len(self._parts))}
        self._scores: dict[int, deque[list[int]]] = {r: deque() for r in range(len(self._parts))}

    def send(self, message: Message, to: int) -> None:
        """The header of a step; nobody hears that a peer is gone before it answers."""
        assert isinstance(message, Step)
        self._deliver(wire.encode(message), to)

    def receive(self, source: int) -> Message:
        """The answer of a rank of the last stage, or of one that holds experts alone."""
        if not self._done[source]:
            raise ClusterError(f"rank {source} is lost: it does not answer")
        return wire.decode(self._done[source].popleft())

    def send_tensor(self, tensor: Tensor, to: int) -> None:
        """The engine sends none."""
        raise AssertionError

    def receive_tensor(self, into: Tensor, source: int) -> Tensor:
        """Scores: 1 for the chosen token, in the columns of the rank's slice."""
        part = self._parts[source]
        first = VOCAB * part.slice // part.slices
        into.zero_()
        for row, token in enumerate(self._scores[source].popleft()):
            if first <= token < first + into.shape[1]:
                into[row, token - first] = 1.0
        return into

    def _deliver(self, data: bytes, rank: int) -> None:
        if self._actors.lost(rank):
            return
        process, step = self._actors.processes[rank], wire.decode(data)
        assert isinstance(step, Step)
        if step.sequence == 1:
            self._actors.steps[rank] = []
        self._actors.steps[rank][1:] = [data]
        process.state, run = member.take(process.state, step)
        assert run, "a step came twice"
        found = process.run(step)
        target = self._routes[rank].target
        if target < len(self._parts):
            self._deliver(data, target)
        elif not (self._parts[rank].experts_only and step.most_rows):
            done = StepDone(epoch=step.epoch, sequence=step.sequence, rows=len(found))
            self._done[rank].append(wire.encode(done))
            if found:
                self._scores[rank].append(found)


class _Muster(Muster):
    """The real one, but for the store and the groups."""

    def __init__(self, job: GroupJob, actors: Actors, channel: Channel) -> None:
        super().__init__(job, cast(real_actors.Actors, actors), cast(ActorChannel, channel))
        self._ranks = actors

    def _meet(self, epoch: int) -> ShardsExecutor:
        join = Join(epoch=epoch, sequence=3, host="simulated", port=1, timeout_s=10.0)
        self._order(lambda _: join, 2 * MEET_S, "meeting")
        return ShardsExecutor(self.job.parts, _Line(self._ranks), epoch, VOCAB, torch.float32)


class Group:
    """As ShardGroup, with two clocks: the supervisor's, and the engine's, which may be behind."""

    def __init__(
        self, replica: Replica, phases: Phases, strikes: Iterable[Strike], seed: int = 0
    ) -> None:
        self._dice = random.Random(seed)
        self.clock = Clock(-1000.0)  # the first start is not part of the period
        self.engine_s = 0.0
        self.recoveries: list[Recovery] = []
        self.epochs = self.refused = 0
        self.actors = Actors(replica, phases, self.clock, strikes, self._dice)
        self.replica = replica
        self._channel = self.actors.channel = Channel(self.actors, self.clock)
        self._job = _job(replica)
        self._muster = _Muster(self._job, self.actors, self._channel)
        self._state = supervisor.State()
        self._history: list[tuple[float, supervisor.State]] = []
        self._live: ShardsExecutor | None = None
        self._come_up(None)
        self.clock.now_s = max(0.0, self.clock.now_s)

    @property
    def banks(self) -> int:
        """See Executor.banks."""
        return self.replica.timing.layout.dp

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """See Executor.run; the engine's clock goes on."""
        if self.engine_s < self.clock.now_s:
            self._wait_or_give_up()
            raise CacheLost(0)
        dp = self.replica.timing.layout.dp
        works = [work_of(piece, dp) for piece in pieces(plan, self.replica.timing.layout.pp)]
        end_s = self.engine_s + self.replica.timing.step_s(works)
        upcoming = self.actors.strikes
        if upcoming and upcoming[0].at_s <= end_s:
            self.clock.now_s = self.engine_s = max(self.engine_s, upcoming[0].at_s)
            self.actors.strike_until(self.engine_s)
        live = self._live
        assert live is not None
        try:
            scores = live.run(plan, tokens)
        except ClusterError:
            self._lose()
            raise CacheLost(0) from None
        if any(span.outputs for span in plan.spans):
            self._moves(end_s)
        self.clock.now_s = self.engine_s = max(self.engine_s, end_s)
        return scores

    def _moves(self, now_s: float) -> None:
        for recovery in reversed(self.recoveries):
            if recovery.moving_s:
                break
            recovery.moving_s = now_s - recovery.lost_at_s

    def keep(self, versions: Set[int]) -> None:
        """See Executor.keep: there is one version."""

    def check_members(self) -> None:
        """All are in the live epoch, have joined, and have run the same steps."""
        states = [process.state for process in self.actors.processes.values()]
        assert len(states) == len(self.replica.parts)
        assert {state.epoch for state in states} == {self._channel.coordinator.epoch}
        assert all(state.joined and not state.drained for state in states)
        assert len({state.steps for state in states}) == 1

    def _wait_or_give_up(self) -> None:
        """The engine hears its callers every LOOK_AGAIN_S; what does not change is skipped."""
        moments = [at_s for at_s, _ in self._history]
        state = self._history[max(0, bisect_right(moments, self.engine_s) - 1)][1]
        limits, down_s = self._job.limits, self._history[0][1].down_since_s
        assert down_s is not None
        after_s = supervisor.gives_up(state, self.engine_s, limits)
        if after_s is not None:
            raise Unavailable("a shard of this model is away", after_s)
        patience_s = down_s + limits.wait_s + LOOK_AGAIN_S
        self.engine_s = max(self.engine_s, min(self.clock.now_s, patience_s))

    def _lose(self) -> None:
        """Detect, recover; then the engine's clock is behind."""
        recovery = Recovery(lost_at_s=self.engine_s)
        self.recoveries.append(recovery)
        self._live, self._history = None, []
        todo = self._detect()
        recovery.detect_s = self.clock.now_s - recovery.lost_at_s
        self._come_up(todo)
        recovery.attempts = sum(state.phase == "recovering" for _, state in self._history)
        recovery.back_s = self.clock.now_s - recovery.lost_at_s - recovery.detect_s

    def _detect(self) -> supervisor.Recover:
        """As ShardGroup._look, each LOOK_EVERY_S, with heartbeats in between."""
        self._channel.beat(self.clock.now_s - BEAT_EVERY_S * self._dice.random(), lost=True)
        self.clock.wait(LOOK_EVERY_S * self._dice.random())
        looks = 0
        while True:
            if looks % int(BEAT_EVERY_S / LOOK_EVERY_S) == 0:
                self._channel.beat(self.clock.now_s)
            todo = self._look()
            if todo is not None:
                return todo
            self.clock.wait(LOOK_EVERY_S)
            looks += 1
            assert looks < 1000, "a loss is not seen"

    def _look(self) -> supervisor.Recover | None:
        now_s, limits = self.clock.now_s, self._job.limits
        dead = tuple(self.actors.dead())
        if dead:
            reason = f"rank {', '.join(map(str, dead))} died"
            state, todo = supervisor.failed(self._state, reason, now_s, limits, dead)
        else:
            ages_s = {o.rank: o.heartbeat_age_s for o in self._muster.topology().owners}
            state, todo = supervisor.beats(self._state, ages_s, now_s, limits, busy=True)
        self._change(state)
        if todo is None and state.phase == "resting":
            todo = self._rest()
        return todo

    def _come_up(self, todo: supervisor.Recover | None) -> None:
        """As ShardGroup._recover: again and again until all shards have met."""
        while True:
            suspects, reason = (todo.suspects, todo.reason) if todo else ((), "")
            try:
                live, _ = self._muster.bring_up(suspects, reason)
                self.refused += self.actors.check_fences()
                live.beat()  # a step to every rank
                break
            except ClusterError as error:
                state, todo = supervisor.failed(
                    self._state, str(error), self.clock.now_s, self._job.limits
                )
                self._change(state)
                todo = todo or self._rest()
        self._live = live
        self._state = supervisor.started(self._state)
        self.epochs += 1
        self.check_members()

    def _rest(self) -> supervisor.Recover:
        self.clock.now_s = max(self.clock.now_s, self._state.rest_until_s)
        state, todo = supervisor.tick(self._state, self.clock.now_s)
        self._change(state)
        assert todo is not None
        return todo

    def _change(self, state: supervisor.State) -> None:
        if state != self._state:
            self._state = state
            self._history.append((self.clock.now_s, state))


def _job(replica: Replica) -> GroupJob:
    return GroupJob(
        run="simulated",
        parts=replica.parts,
        checkpoint="simulated",
        config_digest="simulated",
        dtype="bfloat16",
        vocab_size=VOCAB,
        slots=replica.slots,
        num_cpus=1,
        threads=1,
    )
