"""A worker's side of the control protocol.

    reporter = join(run, group, worker="train-0", rank=0, shard=shard)    # coordinator_actor.py
    for step in ...:
        ...
        reporter.heartbeat(step)

Joining waits for the coordinator's answer. Heartbeats do not: at most one is under way, at most one
a second is sent, and the answer is looked at when the next one is due. So a heartbeat costs
microseconds, and a coordinator that is slow or dead does not slow the worker down.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from gptmoe.errors import ClusterError

from .messages import Begin, Begun, Heartbeat, Message, Refusal, Register, Shard

log = logging.getLogger(__name__)


class Channel(Protocol):
    """How messages reach the coordinator. All methods raise ClusterError if it is gone."""

    def ask(self, message: Message) -> Message:
        """Send, wait, and return the answer."""

    def post(self, message: Message) -> None:
        """Send without waiting."""

    def poll(self) -> Message | None:
        """The answer to the last posted message, or None while it is under way."""


class Reporter:
    """One registered worker. Invariant: `sequence` grows with every message it sends."""

    def __init__(
        self,
        channel: Channel,
        group: str,
        *,
        worker: str,
        rank: int,
        shard: Shard,
        digest: str = "",
        clock: Callable[[], float] = time.monotonic,
        every_s: float = 1.0,
    ) -> None:
        """Register as `worker`.

        `group` names one start of all workers: the same for each of them, new for each start; so is
        `digest` of their code and config.
        Raises ClusterError if the coordinator is gone or refuses.
        """
        self._channel = channel
        self._worker = worker
        self._clock = clock
        self._every_s = every_s
        self._due_at_s = clock()
        self._under_way = False
        self._sequence = 0
        self.epoch = self._begin(group)
        self._register(rank, shard, digest)

    def heartbeat(
        self, step: int, counters: Mapping[str, float] | None = None, *, last: bool = False
    ) -> None:
        """Report that `step` steps are done; `last` sends it now and waits until it has arrived.

        Raises ClusterError if this worker's epoch is over: it must stop. A lost coordinator is a
        warning, once: the work goes on unwatched.
        """
        if not last and self._clock() < self._due_at_s:
            return
        try:
            answer = self._send(self._next_heartbeat(step, dict(counters or {})), wait=last)
        except ClusterError as error:
            log.warning("no more heartbeats worker=%s reason=%s", self._worker, error)
            self._due_at_s = float("inf")
            return
        if isinstance(answer, Refusal):
            raise ClusterError(answer.reason)

    def _send(self, message: Heartbeat, *, wait: bool) -> Message | None:
        """Send unless one is under way; returns the newest answer known."""
        if wait:
            return self._channel.ask(message)
        answer = self._channel.poll() if self._under_way else None
        if self._under_way and answer is None:
            return None
        self._channel.post(message)
        self._under_way = True
        self._due_at_s = self._clock() + self._every_s
        return answer

    def _begin(self, group: str) -> int:
        answer = self._channel.ask(Begin(group=group))
        if isinstance(answer, Begun):
            return answer.epoch
        raise ClusterError(_reason(answer))

    def _register(self, rank: int, shard: Shard, digest: str) -> None:
        message = Register(
            epoch=self.epoch,
            sequence=self._next_sequence(),
            worker=self._worker,
            rank=rank,
            node=socket.gethostname(),
            pid=os.getpid(),
            shard=shard,
            digest=digest,
        )
        answer = self._channel.ask(message)
        if isinstance(answer, Refusal):
            raise ClusterError(answer.reason)

    def _next_heartbeat(self, step: int, counters: dict[str, float]) -> Heartbeat:
        return Heartbeat(
            epoch=self.epoch,
            sequence=self._next_sequence(),
            worker=self._worker,
            step=step,
            counters=counters,
        )

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence


def _reason(answer: Message) -> str:
    return answer.reason if isinstance(answer, Refusal) else f"unexpected answer {answer}"
