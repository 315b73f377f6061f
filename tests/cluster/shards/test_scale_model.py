"""The model behind tests/bench/bench_scale.py: failures, phases, seconds of a step, one replica."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from gptmoe.generate.plan import Span, StepPlan
from tests.bench.bench_scale import DEVICE, MODEL, SLOTS_PER_RANK, serve, simulate
from tests.bench.scale.failures import CAUSES, FAILURES, Failure, Phases, Spares, draw, strikes_of
from tests.bench.scale.group import Group
from tests.bench.scale.timing import Replica, Work, active_experts, plan_replica, work_of
from tests.bench.scale.words import expected, requests_of

YEARS = 6


@pytest.fixture(scope="module")
def replica() -> Replica:
    planned = plan_replica(MODEL, DEVICE, 8, SLOTS_PER_RANK)
    return replace(planned, slots=8)  # fewer sequences: the same paths in less time


def test_failures_come_as_often_as_published_and_the_same_each_time() -> None:
    found = draw(16_384, 54, seed=3)
    assert sum(CAUSES.values()) == FAILURES == 419
    assert 350 < len(found) < 490
    assert found == draw(16_384, 54, seed=3)
    assert found != draw(16_384, 54, seed=4)
    assert Counter(failure.kind for failure in found).most_common(1)[0][0] == "device"
    assert 1.8 < len(draw(16_384, 54, seed=3, times=2.0)) / len(found) < 2.2


def test_a_node_that_goes_takes_all_its_groups_along_and_waits_for_a_spare() -> None:
    phases = Phases(repair_s=1000.0)
    failures = [Failure(10.0, 5, "device"), Failure(20.0, 9, "node"), Failure(30.0, 2, "frozen")]
    found = strikes_of(failures, 16, 4, 8, phases)
    assert sorted(found) == [0, 1, 2, 3]
    first, second = found[0]
    assert (first.ranks, first.silent, first.room_s) == ((0, 1, 2, 3), False, 10.0)
    assert (second.ranks, second.silent, second.room_s) == ((2,), True, 30.0)
    assert found[1] == [first]
    assert found[2][0].room_s == 1010.0  # the only spare went to the first node
    assert Spares([0.0, 0.0], 5.0).swap(1.0) == 1.0


def test_phases_grow_with_bytes_and_ranks() -> None:
    phases = Phases(node_bytes_per_s=8.0, process_bytes_per_s=2.0)
    assert phases.load_s([2.0]) == 1.0
    assert phases.load_s([2.0] * 8) == 2.0
    assert phases.load_s([]) == 0.0
    assert phases.meet_s(8) == 2 * phases.meet_s(4)
    assert 0.5 < phases.start_one_s(random.Random(1)) < 20.0


def test_work_is_dealt_as_slots_are() -> None:
    plan = StepPlan((Span("a", 0, 9, 1, True), Span("b", 3, 4, 6, False)), 1)
    assert work_of(plan, 2) == [Work(1, 10, 9, 1), Work(6, 10, 42, 0)]


def test_a_step_takes_longer_with_more_to_do_and_never_less_than_its_weights() -> None:
    timing = plan_replica(MODEL, DEVICE, 8, SLOTS_PER_RANK).timing
    few, many = Work(1, 100, 100, 1), Work(16, 1600, 1600, 16)
    prompt = Work(2048, 2048, 2048 * 1024, 0)
    seconds = [timing.step_s([[work] * timing.layout.dp]) for work in (few, many, prompt)]
    assert seconds == sorted(seconds)
    assert 1e-3 < seconds[0] < seconds[2] < 1.0
    assert active_experts(64, 1.0) == pytest.approx(1.0)
    assert 60 < active_experts(64, 256.0) < 64


def test_eight_ranks_survive_six_years_of_failures(replica: Replica) -> None:
    result = simulate(8, replica, 365.0 * YEARS, Phases())
    assert result.failures >= 4
    assert len(result.recoveries) == result.failures
    assert result.lost == 0
    assert result.goodput > 0.999
    assert result.refused > 8 * result.failures
    assert 20 < result.moving_s(0.5) < 60  # most failures take a node, whose weights are read anew


def test_losses_one_after_the_other_and_without_room_end_with_the_same_texts(
    replica: Replica,
) -> None:
    phases = Phases(repair_s=300.0, node_bytes_per_s=40e9, process_bytes_per_s=10e9)
    failures = [Failure(at_s, 3, "process") for at_s in (0.2, 2.0, 8.0)]
    failures += [Failure(20.0, 1, "frozen"), Failure(30.0, 2, "device"), Failure(31.0, 2, "node")]
    group = Group(replica, phases, strikes_of(failures, 8, 8, 8, phases)[0])
    requests = requests_of(1, replica.slots)
    served = serve(group, requests, 0.0)
    assert served.lost == 0
    assert not served.unavailable
    for begin_s in (19.9, 100.0):
        served = serve(group, requests, begin_s)
        assert served.lost == 0
    group.check_members()
    assert group.epochs > 2
    assert any(recovery.attempts > 1 for recovery in group.recoveries)


def test_a_token_from_a_stale_cache_is_seen(replica: Replica) -> None:
    group = Group(replica, Phases(), ())
    request = requests_of(1, 1)[0]
    assert len(expected(request)) == request.sampling.max_new_tokens
    served = serve(group, [request], 0.0)
    process = group.actors.processes[0]
    process.cache[0] = (process.cache[0][0] - 1, 0)
    count = process.cache[0][0] + 1
    late = StepPlan((Span("x", 0, count, 1, 1),), 1)
    with pytest.raises(AssertionError, match=f"slot 0 holds {count - 1} tokens, not {count}"):
        group.run(late, {"x": [5] * (count + 1)})
    assert served.lost == 0
