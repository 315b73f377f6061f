"""When a request that failed is given to another replica, and when its caller is told instead."""

import time
from collections.abc import Callable

from gptmoe.errors import ClusterError, GptMoeError, Overloaded, Unavailable

_AGAIN_AFTER_S = 0.5


class ReplicaLost(Unavailable):
    """The replica that worked on a request is gone, or cannot be reached any more."""


class NoReplica(Unavailable):
    """None finishes the request: the last that worked on it is gone, or there is none."""


class OtherText(Unavailable):
    """Another replica does not go on with the text that was begun."""


class Patience:
    """That of one request: so many replicas may be lost, and others take over within a time."""

    def __init__(
        self, tries: int, resume_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tries, self._resume_s, self._clock = tries, resume_s, clock
        self._losses = 0
        self._since_s: float | None = None

    def moved(self) -> None:
        """The request comes along (again)."""
        self._since_s = None

    @property
    def left_s(self) -> float | None:
        """Seconds that another replica has to take over; None: nothing is wrong."""
        if self._since_s is None:
            return None
        return max(0.0, self._since_s + self._resume_s - self._clock())

    def wait_s(self, error: GptMoeError, *, begun: bool = False, can_go_on: bool = True) -> float:
        """Seconds to wait before another try. Raises the error, or NoReplica, if there is none.

        A request that nothing was heard of is refused as a replica refuses it. One that has begun
        waits for room and for parts that come back: it may be one of many that a dead replica left.
        """
        lost = _is_lost(error)
        self._losses += lost
        passes = begun and isinstance(error, Unavailable | Overloaded)
        if isinstance(error, OtherText) or not (lost or passes):
            raise error
        if self._since_s is None:
            self._since_s = self._clock()
        if not can_go_on or self._losses >= self._tries or self.left_s == 0:
            raise NoReplica(
                f"no replica could finish the request; send it again (last: {error})"
            ) from error
        if lost:
            return 0.0
        wanted = error.retry_after_s if isinstance(error, Unavailable | Overloaded) else 0.0
        return min(wanted or _AGAIN_AFTER_S, self._resume_s)


def _is_lost(error: GptMoeError) -> bool:
    """That replica cannot answer any more, whatever it is asked: another one can."""
    if isinstance(error, ReplicaLost):
        return True
    return isinstance(error, ClusterError) and not isinstance(error, Unavailable)
