"""Ranks without processes: what a shard's actor answers, what befalls it, and its coordinator.

Each obeys the real `member`, every message goes through `wire`. The model is replaced: the next
token is a function of all tokens before it, from a cache that dies with its process, so that any
token lost, repeated or computed from a stale cache changes the text.
"""

import random
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from cluster import wire
from cluster.coordinator import Coordinator
from cluster.messages import (
    Command,
    Heartbeat,
    Join,
    Load,
    Message,
    Owner,
    Plan,
    Ready,
    Refusal,
    Register,
    Step,
)
from cluster.shards import member
from gptmoe.errors import ClusterError

from .failures import Phases, Strike
from .timing import Replica
from .words import next_hash, next_token


@dataclass(slots=True)
class Clock:
    """Simulated seconds; never goes back."""

    now_s: float

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        assert seconds >= 0
        self.now_s += seconds


class Process:
    """One actor: ShardActor's answers without its threads and tensors."""

    def __init__(self, began_s: float) -> None:
        self.state = member.State()
        self.began_s, self.dead, self.frozen = began_s, False, False
        self.loaded = False
        self.beats = 1
        self.cache: dict[int, tuple[int, int]] = {}  # by slot: positions, their hash

    def obey(self, command: Command) -> Message:
        """As ShardActor._obey."""
        verdict = member.decide(self.state, command)
        if verdict.answer is not None:
            return verdict.answer
        if isinstance(command, Plan):
            self.loaded &= member.same_weights(self.state.plan, command)
        elif isinstance(command, Load):
            self.loaded = True
        elif isinstance(command, Join):
            self.cache = {}
        ready = Ready(epoch=command.epoch, sequence=command.sequence)
        self.state = member.commit(self.state, command, ready)
        return ready

    def run(self, step: Step) -> list[int]:
        """The next token of each span with outputs."""
        assert not step.copies
        ids, found, at = step.token_ids, [], 0
        for span in step.spans:
            count, history = self.cache.get(span.slot, (0, 0)) if span.start else (0, 0)
            assert count == span.start, f"slot {span.slot} holds {count} tokens, not {span.start}"
            for token in ids[at : at + span.count]:
                history = next_hash(history, token)
            at += span.count
            self.cache[span.slot] = (count + span.count, history)
            if span.outputs:
                found.append(next_token(history))
        assert at == len(ids)
        return found


@dataclass(slots=True)
class Call:
    """A command under way."""

    rank: int
    data: bytes
    ends_s: float
    answer: bytes | None = None


class Actors:
    """Processes by rank, as `cluster.shards.actors.Actors` holds them, and what befalls them."""

    def __init__(
        self,
        replica: Replica,
        phases: Phases,
        clock: Clock,
        strikes: Iterable[Strike],
        dice: random.Random,
    ) -> None:
        self.replica, self.clock = replica, clock
        self.strikes = deque(strikes)
        self.processes: dict[int, Process] = {}
        self.sent: dict[int, list[tuple[int, bytes]]] = {
            rank: [] for rank in range(len(replica.parts))
        }
        """What each rank's processes were sent since the last check of fences, by epoch."""
        self.steps: dict[int, list[bytes]] = {}
        """The first and the last step that each rank took in an epoch."""
        self.channel: Channel
        self._phases, self._dice = phases, dice
        self._room_s = dict.fromkeys(range(len(replica.parts)), clock.now_s)
        self._late: list[tuple[Process, bytes]] = []

    def start(self, rank: int) -> None:
        """A process that answers once there is room and it has started."""
        began_s = max(self.clock.now_s, self._room_s[rank])
        self.processes[rank] = Process(began_s + self._phases.start_one_s(self._dice))

    def kill(self, rank: int, owner: Owner | None = None) -> None:
        """End a process; one that is frozen keeps its place for a while."""
        process = self.processes.pop(rank, None)
        if process is not None and process.frozen:
            gone_s = self.clock.now_s + self._phases.kill_frozen_s
            self._room_s[rank] = max(self._room_s[rank], gone_s)

    def known(self) -> list[int]:
        """Ranks with a process, alive or not."""
        return sorted(self.processes)

    def dead(self) -> list[int]:
        """Ranks whose process is known to have ended."""
        return sorted(rank for rank, process in self.processes.items() if process.dead)

    def send(self, rank: int, data: bytes) -> Call:
        """See Post.send."""
        message = cast(Command, wire.decode(data))
        self.sent[rank].append((message.epoch, data))
        return Call(rank, data, self.clock.now_s + self._took_s(rank, message))

    def wait(self, calls: Mapping[int, Call], within_s: float) -> bool:
        """See Post.wait: time goes on until all have answered or are dead, or for so long."""
        last_s = self.clock.now_s + within_s
        open_s = [call.ends_s for call in calls.values() if self._is_open(call)]
        frozen = any(self.processes[call.rank].frozen for call in calls.values())
        end_s = last_s if frozen else min(last_s, max(open_s, default=self.clock.now_s))
        self.strike_until(end_s)
        self._catch_up()
        for call in calls.values():
            process = self.processes[call.rank]
            if self._is_open(call) and not process.frozen and call.ends_s <= end_s:
                call.answer = self._handle(call.rank, cast(Command, wire.decode(call.data)))
        ended = not any(self._is_open(call) for call in calls.values())
        self.clock.now_s = max(self.clock.now_s, end_s if ended else last_s)
        self.channel.beat(self.clock.now_s)
        return ended

    def collect(self, calls: Mapping[int, Call]) -> dict[int, bytes | None]:
        """See Post.collect: who has not answered carries its command out later."""
        for call in calls.values():
            if self._is_open(call):
                self._late.append((self.processes[call.rank], call.data))
        return {rank: call.answer for rank, call in calls.items()}

    def _is_open(self, call: Call) -> bool:
        """Whether there may yet be an answer."""
        return call.answer is None and not self.processes[call.rank].dead

    def _catch_up(self) -> None:
        """Processes that have started by now carry out what had waited for them."""
        waiting, self._late = self._late, []
        for process, data in waiting:
            known = process in self.processes.values()
            if (
                known
                and not (process.dead or process.frozen)
                and process.began_s <= self.clock.now_s
            ):
                process.obey(cast(Command, wire.decode(data)))
            elif known:
                self._late.append((process, data))

    def strike_until(self, now_s: float) -> None:
        """Failures up to then happen."""
        while self.strikes and self.strikes[0].at_s <= now_s:
            strike = self.strikes.popleft()
            for rank in strike.ranks:
                self._room_s[rank] = max(self._room_s[rank], strike.room_s)
                if rank in self.processes:
                    self.processes[rank].frozen |= strike.silent
                    self.processes[rank].dead |= not strike.silent

    def lost(self, rank: int) -> bool:
        """Whether a rank does not answer any more."""
        process = self.processes.get(rank)
        return process is None or process.dead or process.frozen

    def check_fences(self) -> int:
        """Send what was sent in dead epochs again, and what came too late: how many refusals.

        Nothing of it may change a state.
        """
        refused = 0
        for rank, process in self.processes.items():
            before = process.state
            late = [data for owner, data in self._late if owner is process]
            dead = [data for epoch, data in self.sent[rank] if epoch != before.epoch]
            for data in [*dead, *late, *self.steps.get(rank, ())]:
                message = wire.decode(data)
                assert isinstance(message, (*member.COMMANDS, Step))
                assert message.epoch < before.epoch
                assert self._is_refused(process, message)
                assert process.state is before, "a message of a dead epoch changed a state"
                refused += 1
            self.sent[rank] = [item for item in self.sent[rank] if item[0] == before.epoch]
        self._late.clear()
        return refused

    def _is_refused(self, process: Process, message: Command | Step) -> bool:
        if not isinstance(message, Step):
            return isinstance(process.obey(message), Refusal)
        try:
            member.take(process.state, message)
        except ClusterError:
            return True
        return False

    def _handle(self, rank: int, command: Command) -> bytes:
        """As ShardActor.handle, with the answer as bytes."""
        assert isinstance(command, member.COMMANDS)
        answer = self.processes[rank].obey(command)
        if isinstance(command, Plan) and isinstance(answer, Ready):
            self.channel.register(rank, command)
        return wire.encode(answer)

    def _took_s(self, rank: int, message: Message) -> float:
        process, phases = self.processes[rank], self._phases
        parts = len(self.replica.parts)
        match message:
            case Plan() if not process.state.epoch:
                return max(0.0, process.began_s - self.clock.now_s)
            case Plan():
                return phases.leave_s
            case Load():
                missing = [r for r, p in self.processes.items() if not p.loaded]
                read = [self.replica.weights_bytes[r] for r in missing]
                return 0.0 if process.loaded else phases.load_s(read)
            case Join():
                return phases.meet_s(parts)
        return 0.0


class Channel:
    """The way to the coordinator, over the wire."""

    def __init__(self, actors: Actors, clock: Clock) -> None:
        self._heard_s: float | None = None
        self.coordinator = Coordinator("simulated", self._now_s)
        self._actors, self._clock = actors, clock

    def ask(self, message: Message) -> Message:
        """See reporter.Channel."""
        return wire.decode(self.coordinator.handle_bytes(wire.encode(message)))

    def register(self, rank: int, plan: Plan) -> None:
        """As a shard does with each plan."""
        shard = plan.shards[rank]
        message = Register(
            epoch=plan.epoch,
            sequence=1,
            worker=f"shard-{rank}",
            rank=rank,
            node="simulated",
            pid=1,
            shard=shard,
            digest=plan.config_digest,
        )
        self.ask(message)

    def beat(self, at_s: float, *, lost: bool = False) -> None:
        """All who are alive said so at this moment; `lost`: before some were lost."""
        self._heard_s = at_s
        for rank, process in self._actors.processes.items():
            if lost or not self._actors.lost(rank):
                process.beats += 1
                state = process.state
                self.ask(
                    Heartbeat(
                        epoch=state.epoch,
                        sequence=process.beats,
                        worker=f"shard-{rank}",
                        step=state.steps,
                    )
                )
        self._heard_s = None

    def _now_s(self) -> float:
        return self._clock.now_s if self._heard_s is None else self._heard_s
