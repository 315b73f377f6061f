"""When shards are silent, lost or keep dying: what to do. Pure; events and the time come in.

    serving --step failed, shard silent--> recovering --recovered--> serving
                                               | failed again and again
                                               v
                                            resting  --rest is over--> recovering

A rest grows with the failures of the last minutes. Requests wait while a shard is away, but no
longer than `wait_s`: then they are answered UNAVAILABLE with the time after which to try again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of supervision, in seconds."""

    silent_s: float = 2.0
    """A shard that was not heard of for longer while a step is under way is lost."""
    idle_silent_s: float = 10.0
    """The same while there is nothing to do."""
    wait_s: float = 30.0
    """Requests wait so long for shards that are away."""
    free: int = 2
    first_rest_s: float = 1.0
    most_rest_s: float = 60.0
    """So many recoveries begin at once, the next after a rest, each further one after twice as
    long."""
    forget_s: float = 120.0
    """Failures older than this do not count."""


Phase = Literal["starting", "serving", "recovering", "resting"]


@dataclass(frozen=True, slots=True)
class State:
    """What the supervisor knows."""

    phase: Phase = "starting"
    failures_s: tuple[float, ...] = ()
    """When shards were lost or could not be brought back, within `forget_s`."""
    down_since_s: float | None = None
    rest_until_s: float = 0.0
    reason: str = ""
    """Of the last failure, a sentence."""
    suspects: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Recover:
    """Bring the shards back; `suspects` (ranks) are to be killed first."""

    suspects: tuple[int, ...]
    reason: str


def started(state: State) -> State:
    """All shards have joined: they serve."""
    return replace(state, phase="serving", down_since_s=None)


def beats(
    state: State, ages_s: Mapping[int, float], now_s: float, limits: Limits, *, busy: bool
) -> tuple[State, Recover | None]:
    """Heartbeats: seconds since each rank was heard of; `busy` while a step is under way."""
    if state.phase != "serving":
        return state, None
    limit_s = limits.silent_s if busy else limits.idle_silent_s
    silent = tuple(sorted(rank for rank, age_s in ages_s.items() if age_s > limit_s))
    if not silent:
        return state, None
    ranks = ", ".join(map(str, silent))
    return failed(state, f"rank {ranks} is silent for over {limit_s:g} s", now_s, limits, silent)


def failed(
    state: State, reason: str, now_s: float, limits: Limits, suspects: tuple[int, ...] = ()
) -> tuple[State, Recover | None]:
    """A step, or bringing the shards back, has failed. A rest that has begun goes on."""
    if state.phase == "resting":
        return state, None
    recent = tuple(then_s for then_s in state.failures_s if now_s - then_s < limits.forget_s)
    rest_s = rest_after(len(recent), limits)
    down_s = now_s if state.down_since_s is None else state.down_since_s
    state = State(
        phase="resting" if rest_s else "recovering",
        failures_s=(*recent, now_s),
        down_since_s=down_s,
        rest_until_s=now_s + rest_s,
        reason=reason,
        suspects=suspects,
    )
    return state, None if rest_s else Recover(suspects, reason)


def tick(state: State, now_s: float) -> tuple[State, Recover | None]:
    """Time goes on: a rest may be over."""
    if state.phase == "resting" and now_s >= state.rest_until_s:
        return replace(state, phase="recovering"), Recover(state.suspects, state.reason)
    return state, None


def rest_after(failures: int, limits: Limits) -> float:
    """Seconds of rest before the next recovery, after so many failures before this one."""
    if failures < limits.free:
        return 0.0
    return min(limits.most_rest_s, limits.first_rest_s * 2.0 ** min(failures - limits.free, 30))


def gives_up(state: State, now_s: float, limits: Limits) -> float | None:
    """Seconds after which a request is to be sent again; None while it may wait."""
    if state.down_since_s is None or now_s - state.down_since_s <= limits.wait_s:
        return None
    return max(1.0, state.rest_until_s - now_s)
