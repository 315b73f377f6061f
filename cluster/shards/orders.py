"""Commands to all shards at once, and who answered."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster import wire
from cluster.messages import Command, Failure, Ready, Refusal
from gptmoe.errors import ClusterError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5


class Post(Protocol):
    """How bytes reach shards, and come back."""

    def send(self, rank: int, data: bytes) -> Any:
        """Start; what comes back names the call."""

    def wait(self, calls: Mapping[int, Any], within_s: float) -> bool:
        """Whether all calls have ended, in an answer or a loss, after so long at most."""

    def collect(self, calls: Mapping[int, Any]) -> dict[int, bytes | None]:
        """The answers by rank; None for a rank that is lost or has not answered yet."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the shards said to one command."""

    ready: dict[int, Ready]
    lost: tuple[int, ...]
    """Ranks that did not answer."""
    refusals: dict[int, str]
    """Ranks that would not or could not, with their reasons."""

    def check(self, what: str) -> None:
        """Raise ClusterError unless all are ready."""
        if self.refusals:
            rank, reason = next(iter(self.refusals.items()))
            raise ClusterError(f"{what}: rank {rank} says: {reason}")
        if self.lost:
            ranks = ", ".join(map(str, self.lost))
            raise ClusterError(f"{what}: rank {ranks} does not answer")


def order(
    post: Post,
    ranks: Sequence[int],
    command: Callable[[int], Command],
    within_s: float,
    hopeless: Callable[[], bool] = lambda: False,
) -> Answers:
    """Send each rank its command, wait for all answers: for so long at most, and not when it has
    become `hopeless`, which is asked twice a second."""
    calls = {rank: post.send(rank, wire.encode(command(rank))) for rank in ranks}
    left_s = within_s
    while left_s > 0 and not post.wait(calls, min(LOOK_EVERY_S, left_s)) and not hopeless():
        left_s -= LOOK_EVERY_S
    return sort_answers(post.collect(calls))


def sort_answers(answers: Mapping[int, bytes | None]) -> Answers:
    """Answers by what they mean."""
    ready, lost, refusals = {}, [], {}
    for rank, data in sorted(answers.items()):
        message = None if data is None else wire.decode(data)
        match message:
            case None:
                lost.append(rank)
            case Ready():
                ready[rank] = message
            case Refusal() | Failure():
                refusals[rank] = message.reason
            case _:
                refusals[rank] = f"it answers {type(message).__name__}"
    return Answers(ready, tuple(lost), refusals)
