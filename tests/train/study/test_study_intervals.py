"""Intervals, smoothing, the step to a loss and verdicts, against numbers worked out by hand."""

import math

import pytest

from train.study.intervals import (
    _T_975,
    Interval,
    interval,
    judge,
    ratio_interval,
    smoothed,
    step_to,
)


@pytest.mark.parametrize("freedom", range(1, 31))
def test_students_quantiles(freedom: int) -> None:
    """Half of the mass, 0.5, plus that from 0 to t by Simpson's rule, is 0.975."""
    scale = math.gamma((freedom + 1) / 2) / (math.gamma(freedom / 2) * math.sqrt(freedom * math.pi))
    count, end = 4000, _T_975[freedom - 1]
    ys = [
        scale * (1 + (end * i / count) ** 2 / freedom) ** (-(freedom + 1) / 2)
        for i in range(count + 1)
    ]
    mass = (ys[0] + ys[-1] + 4 * sum(ys[1:-1:2]) + 2 * sum(ys[2:-1:2])) * end / count / 3
    assert 0.5 + mass == pytest.approx(0.975, abs=3e-5)


def test_an_interval_of_three() -> None:
    found = interval([-0.10, -0.14, -0.12])
    half = 4.303 * 0.02 / math.sqrt(3)  # the standard deviation is 0.02
    assert found == Interval(
        pytest.approx(-0.12), pytest.approx(-0.12 - half), pytest.approx(-0.12 + half), 3
    )


def test_one_value_has_no_interval() -> None:
    assert interval([0.5]) == Interval(0.5, -math.inf, math.inf, 1)
    assert ratio_interval([2.0]) == Interval(pytest.approx(2.0), 0.0, math.inf, 1)


def test_the_mean_of_ratios_is_geometric() -> None:
    found = ratio_interval([2.0, 0.5, 1.0])
    assert found.mean == pytest.approx(1.0)
    assert found.high == pytest.approx(1 / found.low)
    assert found.high == pytest.approx(math.exp(4.303 * math.log(2) / math.sqrt(3)))


def test_smoothing_narrows_towards_the_ends() -> None:
    curve = [(1, 9.0), (2, 6.0), (3, 3.0), (4, 6.0), (5, 1.0)]
    assert smoothed(curve, 3) == [(1, 9.0), (2, 6.0), (3, 5.0), (4, 10 / 3), (5, 1.0)]
    assert smoothed(curve, 5)[2] == (3, 5.0)
    assert smoothed(curve, 1) == curve


def test_the_step_to_a_loss_lies_on_the_line_between_two() -> None:
    curve = [(100, 6.0), (200, 5.0), (300, 4.0), (400, 4.5), (500, 3.0)]
    assert step_to(curve, 4.75) == pytest.approx(225)
    assert step_to(curve, 5.0) == 200
    assert step_to(curve, 4.2) == pytest.approx(280)  # the first time, though it rises again
    assert step_to(curve, 7.0) == 100
    assert step_to(curve, 2.9) is None


@pytest.mark.parametrize(
    ("found", "bound", "want", "state", "text"),
    [
        (Interval(0.004, 0.001, 0.007, 3), 0.01, "at most", "reached", "reached"),
        (Interval(0.02, 0.015, 0.025, 3), 0.01, "at most", "missed", "missed by 0.01"),
        (Interval(0.008, 0.0, 0.02, 3), 0.01, "at most", "open",
         "not carried by the interval; the mean keeps it"),
        (Interval(0.015, 0.0, 0.03, 3), 0.01, "at most", "open",
         "not carried by the interval; the mean misses it by 0.005"),
        (Interval(1.6, 1.5, 1.7, 3), 1.48, "at least", "reached", "reached"),
        (Interval(1.2, 1.1, 1.3, 3), 1.48, "at least", "missed", "missed by 0.28"),
        (Interval(1.6, -math.inf, math.inf, 1), 1.48, "at least", "open",
         "not carried: one seed has no interval; the mean keeps it"),
    ],
)  # fmt: skip
def test_a_verdict_is_what_the_interval_carries(
    found: Interval, bound: float, want: str, state: str, text: str
) -> None:
    verdict = judge(found, bound, want)  # type: ignore[arg-type]
    assert (verdict.state, verdict.text) == (state, text)
