"""When shards are lost: at once, after a rest, or not yet; with a clock that the test moves."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.shards.supervisor import (
    Limits,
    Recover,
    State,
    beats,
    failed,
    gives_up,
    rest_after,
    started,
    tick,
)

LIMITS = Limits()
SERVING = started(State())


def fails_each_second(times: int, limits: Limits = LIMITS) -> list[tuple[State, Recover | None]]:
    """What follows each of so many failures at 1 s, 2 s, ...; shards come back in between."""
    state, seen = SERVING, []
    for now_s in range(1, times + 1):
        state, todo = failed(state, "a step failed", now_s, limits)
        seen.append((state, todo))
        state = started(state)
    return seen


@pytest.mark.parametrize(
    ("busy", "age_s", "silent"),
    [(True, 2.0, False), (True, 2.5, True), (False, 2.5, False), (False, 10.5, True)],
)
def test_silence_is_a_loss_sooner_while_a_step_is_under_way(
    busy: bool, age_s: float, silent: bool
) -> None:
    state, todo = beats(SERVING, {0: 0.1, 1: age_s}, 50.0, LIMITS, busy=busy)
    assert state.phase == ("recovering" if silent else "serving")
    if not silent:
        assert todo is None
        assert state == SERVING
        return
    reason = f"rank 1 is silent for over {2 if busy else 10} s"
    assert todo == Recover((1,), reason)
    assert (state.reason, state.suspects, state.down_since_s) == (reason, (1,), 50.0)


def test_all_silent_ranks_are_suspects_in_order() -> None:
    _, todo = beats(SERVING, {3: 9.0, 0: 0.1, 1: 9.0}, 50.0, LIMITS, busy=True)
    assert todo == Recover((1, 3), "rank 1, 3 is silent for over 2 s")


def test_beats_count_only_while_shards_serve() -> None:
    recovering, _ = failed(SERVING, "lost", 1.0, LIMITS)
    *_, (resting, _) = fails_each_second(3)
    assert (recovering.phase, resting.phase) == ("recovering", "resting")
    for state in (State(), recovering, resting):
        assert beats(state, {0: 1e9}, 2.0, LIMITS, busy=True) == (state, None)


def test_two_recoveries_begin_at_once_and_the_next_after_growing_rests() -> None:
    seen = fails_each_second(12)
    rests_s = [state.rest_until_s - now_s for now_s, (state, _) in enumerate(seen, 1)]
    assert rests_s == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert [todo is not None for _, todo in seen] == [True, True] + 10 * [False]
    phases = [state.phase for state, _ in seen]
    assert phases == ["recovering"] * 2 + ["resting"] * 10


def test_a_recovery_that_fails_is_a_failure_as_any_other() -> None:
    state, todo = failed(SERVING, "rank 1 died", 1.0, LIMITS, (1,))
    assert todo == Recover((1,), "rank 1 died")
    state, todo = failed(state, "no room", 2.0, LIMITS)
    assert todo == Recover((), "no room")
    state, todo = failed(state, "no room", 3.0, LIMITS)
    assert (todo, state.phase, state.rest_until_s) == (None, "resting", 4.0)
    assert state.down_since_s == 1.0


def test_old_failures_are_forgotten() -> None:
    state, _ = fails_each_second(3)[-1]
    later, todo = failed(started(state), "lost", 3.0 + LIMITS.forget_s, LIMITS)
    assert todo is not None
    assert later.failures_s == (123.0,)
    state, todo = failed(started(state), "lost", 2.5 + LIMITS.forget_s, LIMITS)
    assert todo is not None
    assert state.failures_s == (3.0, 122.5)


def test_suspects_survive_a_rest() -> None:
    state, _ = fails_each_second(2)[-1]
    state, todo = beats(started(state), {0: 0.0, 2: 5.0}, 3.0, LIMITS, busy=True)
    assert (todo, state.phase) == (None, "resting")
    assert tick(state, 3.9) == (state, None)
    state, todo = tick(state, 4.0)
    assert todo == Recover((2,), "rank 2 is silent for over 2 s")
    assert state.phase == "recovering"
    assert tick(state, 5.0) == (state, None)


def test_a_rest_is_neither_cut_short_nor_made_longer_by_another_failure() -> None:
    resting, _ = fails_each_second(8)[-1]
    resting = replace(resting, failures_s=(1.0,))
    assert failed(resting, "again", 9.0, LIMITS) == (resting, None)


def test_requests_wait_for_a_while_and_then_hear_when_to_come_back() -> None:
    assert gives_up(SERVING, 1e6, LIMITS) is None
    state, _ = failed(SERVING, "lost", 100.0, LIMITS)
    assert gives_up(state, 130.0, LIMITS) is None
    assert gives_up(state, 130.5, LIMITS) == 1.0
    state = replace(state, phase="resting", rest_until_s=160.0)
    assert gives_up(state, 131.0, LIMITS) == 29.0
    assert gives_up(state, 159.5, LIMITS) == 1.0
    assert gives_up(started(state), 159.5, LIMITS) is None


def test_requests_wait_since_the_first_of_several_failures() -> None:
    state, _ = failed(SERVING, "lost", 100.0, LIMITS)
    state, _ = failed(state, "no room", 120.0, LIMITS)
    assert gives_up(state, 131.0, LIMITS) == 1.0


quarters = st.integers(0, 400).map(lambda number: number / 4)
any_limits = st.builds(
    Limits,
    free=st.integers(0, 3),
    first_rest_s=quarters,
    most_rest_s=quarters,
    forget_s=quarters,
)
any_events = st.lists(
    st.tuples(st.sampled_from(["failed", "silent", "tick", "started"]), quarters), max_size=40
)


@given(failures=st.integers(0, 10_000), limits=any_limits)
def test_a_rest_grows_with_failures_up_to_its_bound(failures: int, limits: Limits) -> None:
    assert rest_after(failures, limits) <= rest_after(failures + 1, limits) <= limits.most_rest_s
    if failures < limits.free:
        assert rest_after(failures, limits) == 0


@given(limits=any_limits, events=any_events)
def test_no_recovery_begins_before_its_time(
    limits: Limits, events: list[tuple[str, float]]
) -> None:
    state, now_s = SERVING, 0.0
    for event, passes_s in events:
        before, todo = state, None
        now_s += passes_s
        if event == "failed":
            state, todo = failed(state, "lost", now_s, limits)
        elif event == "silent":
            state, todo = beats(state, {0: 1e9}, now_s, limits, busy=True)
        elif event == "tick":
            state, todo = tick(state, now_s)
        elif state.phase == "recovering":
            state = started(state)
        if before.phase == "resting" and (todo or state != before):
            assert event == "tick"
            assert now_s >= before.rest_until_s
        if before.phase == "recovering" and todo:
            assert event == "failed"
        if todo:
            assert state.phase == "recovering"
            assert now_s >= state.rest_until_s
        assert state.rest_until_s <= now_s + limits.most_rest_s
        assert (state.phase == "serving") == (state.down_since_s is None)
