"""What a few noisy runs can say: smoothed curves, the step to a loss, paired intervals. Pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Curve = Sequence[tuple[float, float]]
"""(step, loss), in order of steps."""

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t that 97.5 % lie below, for 1 to 30 degrees of freedom; the last serves beyond."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval; without one (low = -inf, high = inf) for a single value."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Student's t-interval for the mean of independent values, such as differences by seed."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = _T_975[min(count - 1, len(_T_975)) - 1] * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def ratio_interval(ratios: Sequence[float]) -> Interval:
    """The same for the geometric mean of ratios: halves and doubles weigh alike."""
    logs = interval([math.log(ratio) for ratio in ratios])
    high = math.exp(logs.high) if logs.high < math.inf else math.inf
    return Interval(math.exp(logs.mean), math.exp(logs.low), high, logs.count)


def smoothed(curve: Curve, width: int) -> list[tuple[float, float]]:
    """Moving mean of `width` (odd) points around each; fewer near the ends, none at the last."""
    reach = width // 2
    result = []
    for index, (step, _) in enumerate(curve):
        near = min(reach, index, len(curve) - 1 - index)
        window = [loss for _, loss in curve[index - near : index + near + 1]]
        result.append((step, statistics.fmean(window)))
    return result


def step_to(curve: Curve, loss: float) -> float | None:
    """The step at which a curve first comes down to `loss`, between points on a straight line.

    None if it never does.
    """
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return step
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a bound is kept, as far as the interval carries."""

    state: Literal["reached", "missed", "open"]
    text: str


def judge(found: Interval, bound: float, want: Literal["at most", "at least"]) -> Verdict:
    """Hold an interval against a bound: all of it must lie on one side."""
    sign = 1 if want == "at most" else -1
    over = sign * (found.mean - bound)
    side = f"the mean misses it by {over:.3g}" if over > 0 else "the mean keeps it"
    if found.count < 2:
        return Verdict("open", f"not carried: one seed has no interval; {side}")
    worst, best = (found.high, found.low) if sign > 0 else (found.low, found.high)
    if sign * (worst - bound) <= 0:
        return Verdict("reached", "reached")
    if sign * (best - bound) > 0:
        return Verdict("missed", f"missed by {over:.3g}")
    return Verdict("open", f"not carried by the interval; {side}")
