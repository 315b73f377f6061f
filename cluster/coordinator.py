"""Who owns what: the pure state of a run's workers, driven by control messages.

    Begin -> Begun        a new group of workers opens the next epoch; the old owners are forgotten
    Register -> Accepted  a worker of the live epoch owns a shard
    Heartbeat -> Accepted its step and counters move on
    Failure -> Accepted   workers of the live epoch are lost; kept for people to read
    TopologyRequest -> Topology
    anything else         Refusal, and the state stays as it was

Nothing here knows Ray or reads a clock of its own: `coordinator_actor.py` wraps it for Ray.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from gptmoe.errors import ClusterError

from . import wire
from .messages import (
    Accepted,
    Begin,
    Begun,
    Failure,
    Heartbeat,
    Message,
    Owner,
    Refusal,
    Register,
    Topology,
    TopologyRequest,
)

FAILURES_KEPT = 20


@dataclass(slots=True)
class _Worker:
    owner: Owner
    sequence: int
    heard_at_s: float


class Coordinator:
    """The live epoch of one run and its registered workers.

    Invariants: at most one worker a rank, all of the live epoch and one digest; a refused message
    changes nothing; nor does one that arrives twice, or after a later one of the same worker.
    """

    def __init__(self, run: str, clock: Callable[[], float]) -> None:
        self.run = run
        self.epoch = 0
        self._clock = clock
        self._epoch_of_group: dict[str, int] = {}
        self._workers: dict[str, _Worker] = {}
        self._failures: list[Failure] = []
        self._digest: str | None = None

    def handle(self, message: Message) -> Message:
        """Apply one message and answer it."""
        match message:
            case Begin():
                return self._begin(message)
            case TopologyRequest():
                return self.topology()
            case Register() | Heartbeat() if message.epoch != self.epoch:
                return self._refuse(
                    f"epoch {message.epoch} of worker {message.worker} is over, "
                    f"epoch {self.epoch} is live; the worker must stop"
                )
            case Failure():
                return self._failure(message)
            case Register():
                return self._register(message)
            case Heartbeat():
                return self._heartbeat(message)
        return self._refuse(f"a coordinator does not take {type(message).__name__} messages")

    def handle_bytes(self, data: bytes) -> bytes:
        """`handle` over the wire; malformed bytes are answered with a Refusal."""
        try:
            answer = self.handle(wire.decode(data))
        except ClusterError as error:
            answer = self._refuse(str(error))
        return wire.encode(answer)

    def topology(self) -> Topology:
        """The owners of the live epoch in rank order, with the age of their last message."""
        now_s = self._clock()
        owners = (
            replace(worker.owner, heartbeat_age_s=max(0.0, now_s - worker.heard_at_s))
            for worker in self._workers.values()
        )
        by_rank = tuple(sorted(owners, key=lambda owner: owner.rank))
        failures = tuple(self._failures)
        return Topology(epoch=self.epoch, run=self.run, owners=by_rank, failures=failures)

    def _failure(self, message: Failure) -> Message:
        if message.epoch > self.epoch:
            return self._refuse(f"epoch {message.epoch} has not begun, epoch {self.epoch} is live")
        if message not in self._failures:
            self._failures = [*self._failures, message][-FAILURES_KEPT:]
        return Accepted(epoch=self.epoch)

    def _begin(self, message: Begin) -> Message:
        if not message.group:
            return self._refuse("Begin needs the name of a group of workers, found an empty one")
        epoch = self._epoch_of_group.get(message.group)
        if epoch is None:
            self.epoch += 1
            self._epoch_of_group[message.group] = epoch = self.epoch
            self._workers.clear()
            self._digest = None
        if epoch != self.epoch:
            return self._refuse(
                f"group {message.group} belongs to epoch {epoch}, epoch {self.epoch} is live; "
                "its workers must stop"
            )
        return Begun(epoch=epoch)

    def _register(self, message: Register) -> Message:
        if self._digest is None:
            self._digest = message.digest
        if message.digest != self._digest:
            return self._refuse(
                f"worker {message.worker} on {message.node} runs other code or another config "
                f"(digest {message.digest}) than the workers of epoch {self.epoch} (digest "
                f"{self._digest}); give all nodes the same checkout"
            )
        owner = Owner(
            worker=message.worker,
            rank=message.rank,
            node=message.node,
            pid=message.pid,
            shard=message.shard,
        )
        for other in self._workers.values():
            if other.owner.rank == owner.rank or other.owner.worker == owner.worker:
                same = replace(other.owner, step=0, counters={}) == owner
                return Accepted(epoch=self.epoch) if same else self._taken(owner, other.owner)
        self._workers[owner.worker] = _Worker(owner, message.sequence, self._clock())
        return Accepted(epoch=self.epoch)

    def _heartbeat(self, message: Heartbeat) -> Message:
        worker = self._workers.get(message.worker)
        if worker is None:
            return self._refuse(f"worker {message.worker} is not registered; send Register first")
        if message.sequence > worker.sequence:
            worker.owner = replace(worker.owner, step=message.step, counters=message.counters)
            worker.sequence = message.sequence
            worker.heard_at_s = self._clock()
        return Accepted(epoch=self.epoch)

    def _taken(self, wanted: Owner, holder: Owner) -> Refusal:
        return self._refuse(
            f"worker {wanted.worker} (pid {wanted.pid}) cannot register as rank {wanted.rank}: in "
            f"epoch {self.epoch} worker {holder.worker} (pid {holder.pid}) is rank {holder.rank}"
        )

    def _refuse(self, reason: str) -> Refusal:
        return Refusal(epoch=self.epoch, reason=reason)
