"""Learning rates against the formulas, written out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import ConfigError
from train.schedule import ScheduleSpec, learning_rate

RATE, FLOOR, WARMUP, HORIZON = 1e-3, 1e-4, 10, 110


def resolved(kind: str = "linear", **changes: object) -> ScheduleSpec:
    values = {
        "kind": kind,
        "learning_rate": RATE,
        "min_learning_rate": FLOOR,
        "warmup_steps": WARMUP,
        "horizon_steps": HORIZON,
    }
    return ScheduleSpec(**{**values, **changes}).resolved(  # type: ignore[arg-type]
        learning_rate=None, min_learning_rate=None, batch_tokens=100, horizon_steps=7
    )


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_rate(kind: str) -> None:
    rates = [learning_rate(resolved(kind), step) for step in range(1, WARMUP + 1)]
    assert rates == pytest.approx([RATE * step / WARMUP for step in range(1, WARMUP + 1)])


@pytest.mark.parametrize("step", [11, 60, 109, 110])
def test_linear_and_cosine_fall_to_the_minimum_at_the_horizon(step: int) -> None:
    done = (step - 10) / 100
    assert learning_rate(resolved("linear"), step) == pytest.approx(
        FLOOR + (RATE - FLOOR) * (1 - done)
    )
    assert learning_rate(resolved("cosine"), step) == pytest.approx(
        FLOOR + (RATE - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
    )


@given(st.integers(110, 10**7), st.sampled_from(["linear", "cosine"]))
def test_beyond_the_horizon_the_minimum_stays(step: int, kind: str) -> None:
    assert learning_rate(resolved(kind), step) == pytest.approx(FLOOR)


@given(st.integers(1, 10**7))
def test_noam_by_its_formula(step: int) -> None:
    rate = learning_rate(resolved("noam"), step)
    assert rate == pytest.approx(RATE * min(step**-0.5, step * WARMUP**-1.5))


def test_noam_peaks_where_its_warm_up_ends() -> None:
    rates = [learning_rate(resolved("noam"), step) for step in range(1, 50)]
    assert rates.index(max(rates)) + 1 == WARMUP


def test_constant_stays_constant() -> None:
    assert {learning_rate(resolved("constant"), step) for step in (10, 99, 10**6)} == {RATE}


def test_without_warm_up_the_first_step_takes_almost_the_whole_rate() -> None:
    spec = resolved(warmup_steps=0)
    assert learning_rate(spec, 1) == pytest.approx(FLOOR + (RATE - FLOOR) * (1 - 1 / HORIZON))
    assert learning_rate(resolved("noam", warmup_steps=0), 1) == RATE


def test_tokens_are_counted_in_whole_steps() -> None:
    spec = resolved(warmup_steps=None, warmup_tokens=950, horizon_steps=None, horizon_tokens=11_000)
    assert (spec.warmup_steps, spec.horizon_steps) == (10, 110)
    assert (spec.warmup_tokens, spec.horizon_tokens) == (None, None)


def test_the_horizon_is_the_run_s_length_only_if_none_is_named() -> None:
    assert resolved(horizon_steps=None).horizon_steps == 7
    assert resolved().horizon_steps == HORIZON


def test_rates_come_from_the_config_then_the_preset_then_the_default() -> None:
    def rates(spec: ScheduleSpec, rate: float | None, floor: float | None) -> tuple[object, object]:
        done = spec.resolved(
            learning_rate=rate, min_learning_rate=floor, batch_tokens=1, horizon_steps=1
        )
        return done.learning_rate, done.min_learning_rate

    assert rates(ScheduleSpec(), None, None) == (1e-3, 1e-4)
    assert rates(ScheduleSpec(), 6e-4, 6e-5) == (6e-4, 6e-5)
    assert rates(ScheduleSpec(learning_rate=2e-4), 6e-4, 6e-5) == (2e-4, pytest.approx(2e-5))
    assert rates(ScheduleSpec(min_learning_rate=0.0), 6e-4, 6e-5) == (6e-4, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"warmup_steps": 1, "warmup_tokens": 1},
            "give only one of schedule.warmup_steps and schedule.warmup_tokens",
        ),
        (
            {"horizon_steps": 1, "horizon_tokens": 1},
            "give only one of schedule.horizon_steps and schedule.horizon_tokens",
        ),
        ({"learning_rate": -1.0}, "schedule.learning_rate=-1.0 must be at least 0"),
        ({"learning_rate": math.nan}, "schedule.learning_rate=nan must be at least 0"),
        ({"warmup_steps": -1}, "schedule.warmup_steps=-1 must be at least 0"),
        ({"horizon_tokens": -1}, "schedule.horizon_tokens=-1 must be at least 0"),
    ],
)
def test_a_wrong_schedule_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleSpec(**changes)  # type: ignore[arg-type]
