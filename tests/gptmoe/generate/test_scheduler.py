"""Who runs, who waits, who is put off: checked against a cache that remembers tokens."""

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import ConfigError
from gptmoe.generate.plan import Progress, Span, StepPlan, plan_step, share_out
from gptmoe.generate.scheduler import EngineConfig, Entry, Lane
from gptmoe.generate.slots import BLOCK, Copy

from .machine import CONTEXT, Machine, arrive_somehow


def test_decoding_comes_first_and_prompts_share_what_is_left() -> None:
    running = [Progress("a", 0, 10, 0), Progress("b", 1, 7, 6), Progress("c", 2, 20, 5)]
    assert plan_step(running, token_budget=13) == StepPlan(
        spans=(
            Span("b", 1, start=6, count=1, outputs=1),
            Span("a", 0, start=0, count=10, outputs=1),
            Span("c", 2, start=5, count=2, outputs=0),
        ),
        num_decoding=1,
    )


def test_nothing_to_run() -> None:
    assert plan_step([], token_budget=8) == StepPlan((), 0)


def test_a_prompt_of_one_token_decodes() -> None:
    assert plan_step([Progress("a", 0, 1, 0)], 8).num_decoding == 1


@pytest.mark.parametrize(
    ("computed", "count", "score_from", "outputs"),
    [(0, 4, 0, 0), (0, 4, 1, 4), (0, 4, 3, 2), (4, 6, 3, 6), (4, 6, 10, 1), (0, 10, 1, 10)],
)
def test_scored_tokens_want_the_scores_before_them(
    computed: int, count: int, score_from: int, outputs: int
) -> None:
    progress = Progress("a", 0, 10, computed, score_from, most=count)
    (span,) = plan_step([progress], 100).spans
    assert (span.count, span.outputs) == (count, outputs)


progress = st.tuples(st.integers(1, 60), st.integers(0, 59)).filter(lambda pair: pair[1] < pair[0])


@given(st.lists(progress, max_size=12), st.integers(12, 64))
def test_what_a_plan_runs(pairs: list[tuple[int, int]], budget: int) -> None:
    running = [Progress(str(i), i, known, done) for i, (known, done) in enumerate(pairs)]
    plan = plan_step(running, budget)
    decoding, chunks = plan.spans[: plan.num_decoding], plan.spans[plan.num_decoding :]
    by_key = {p.key: p for p in running}
    assert [s.key for s in decoding] == [p.key for p in running if p.known - p.computed == 1]
    assert sum(span.count for span in plan.spans) <= budget
    assert [s.slot for s in chunks] == sorted(s.slot for s in chunks)  # in the order given
    for span in plan.spans:
        owner = by_key[span.key]
        assert span.start == owner.computed
        assert 0 < span.count <= owner.known - owner.computed
        assert span.outputs == (span.start + span.count == owner.known)


@given(st.lists(st.integers(1, 500), max_size=10), st.integers(0, 600))
def test_the_budget_is_used_up_and_the_first_in_line_gets_half(
    wanted: list[int], budget: int
) -> None:
    got = share_out(wanted, budget)
    assert all(0 <= mine <= most for mine, most in zip(got, wanted, strict=True))
    assert sum(got) == min(budget, sum(wanted))
    if wanted:
        assert got[0] >= min(wanted[0], budget / 2)


def test_short_prompts_pass_a_long_one() -> None:
    assert share_out([400, 30, 20], budget=100) == [50, 30, 20]
    assert share_out([400, 300, 20], budget=100) == [50, 30, 20]


SHAPES = ((4, 1, 0), (4, 1, CONTEXT + BLOCK), (8, 2, 400), (8, 2, 0), (3, 1, 250))
"""Slots, banks, kv_tokens."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_arrivals_cancels_finishes_and_refreshes(
    seed: int, shape: tuple[int, int, int]
) -> None:
    slots, banks, kv_tokens = shape
    random = Random(seed)
    budget = random.randint(slots, 100)
    config = EngineConfig(max_batch_size=slots, token_budget=budget, kv_tokens=kv_tokens)
    machine = Machine(config, banks, random)
    scheduler = machine.scheduler
    for _ in range(400):
        actions = ("arrive", "step", "cancel", "lost", "refresh", "restart")
        match random.choices(actions, (6, 12, 1, 0.2, 0.2, 0.1))[0]:
            case "arrive":
                arrive_somehow(machine, random)
            case "step":
                machine.step()
            case "cancel" if alive := scheduler.waiting + scheduler.running:
                gone = random.choice(alive)
                scheduler.remove(gone)
                machine.entries.remove(gone)
            case "lost":
                machine.lose()
            case "refresh":
                machine.refresh(restart=False)
            case "restart":
                machine.refresh(restart=True)
    while scheduler.waiting or scheduler.running:
        assert machine.step().spans, "somebody always gets on"
    assert {id(entry) for entry in machine.finished} == {id(entry) for entry in machine.entries}
    assert scheduler.pool.used_blocks == 0
    assert scheduler.pool.num_free == slots
    assert scheduler.prefix_hits > 0
    if kv_tokens:
        assert scheduler.preemptions > 0


def alone(prompt: Sequence[int], **config: int) -> Machine:
    machine = Machine(EngineConfig(**config), 1, Random(0))  # type: ignore[arg-type]
    machine.arrive(prompt, 1, 3, 0)
    while machine.scheduler.running or machine.scheduler.waiting:
        machine.step()
    return machine


def test_a_known_beginning_is_taken_over_in_place() -> None:
    machine = alone([1] * 70)
    machine.arrive([1] * 70, 1, 3, 0)
    plan = machine.step()
    assert plan.copies == ()
    assert [(span.start, span.count) for span in plan.spans] == [(64, 6)]
    assert machine.scheduler.prefix_hits == 64


def test_the_beginning_of_a_running_sequence_is_copied_once() -> None:
    machine = Machine(EngineConfig(), 1, Random(0))
    machine.arrive([1] * 70, 1, 20, 0)
    machine.step()
    machine.arrive([1] * 70 + [2], 1, 20, 0)
    plan = machine.step()
    assert plan.copies == (Copy(source=0, target=1, count=64),)
    assert machine.step().copies == ()


def test_without_a_prefix_cache_all_is_computed() -> None:
    machine = alone([1] * 70, prefix_cache=False)
    machine.arrive([1] * 70, 1, 3, 0)
    assert machine.step().spans[0].start == 0


def test_other_weights_share_no_beginning() -> None:
    machine = alone([1] * 70)
    machine.scheduler.version = 1
    machine.arrive([1] * 70, 1, 3, 0)
    assert machine.step().spans[0].start == 0


def test_what_is_scored_is_computed() -> None:
    machine = alone([1] * 70)
    lane = Lane("0/b", [1] * 70, score_from=20)
    machine.scheduler.add(Entry((0, 9), [lane]))
    (span,) = machine.scheduler.plan().spans
    assert span.start == BLOCK  # the scores behind token 19 are wanted


def test_the_last_in_line_is_put_off_and_goes_on_with_its_tokens() -> None:
    machine = Machine(EngineConfig(max_batch_size=4, kv_tokens=CONTEXT), 1, Random(0))
    machine.arrive([1] * 70, 1, 60, 0)
    machine.arrive([2] * 70, 1, 60, 0)
    while not machine.scheduler.preemptions:
        machine.step()
    (first,), (second,) = machine.scheduler.running, machine.scheduler.waiting
    assert first.rank < second.rank
    assert len(second.lanes[0].tokens) > 70
    for _ in range(200):
        machine.step()
    assert [entry.rank for entry in machine.finished] == [first.rank, second.rank]


def test_who_is_put_off_goes_on_with_the_weights_it_began_with() -> None:
    machine = Machine(EngineConfig(max_batch_size=4, kv_tokens=CONTEXT), 1, Random(0))
    machine.arrive([1] * 70, 1, 60, 0)
    machine.arrive([2] * 70, 1, 60, 0)
    while not machine.scheduler.preemptions:
        machine.step()
    (late,) = machine.scheduler.waiting
    machine.refresh(restart=False)
    assert machine.scheduler.versions() == {0, 1}
    machine.arrive([2] * 70, 1, 10, 0)
    for _ in range(300):
        machine.step()  # checks the version of each plan
    assert len(machine.finished) == 3
    assert late.version == 0
    assert machine.scheduler.versions() == {1}


@pytest.mark.parametrize("event", ["restart", "lost"])
def test_who_is_put_off_goes_on_with_new_weights_if_all_do(event: str) -> None:
    machine = Machine(EngineConfig(max_batch_size=4, kv_tokens=CONTEXT), 1, Random(0))
    machine.arrive([1] * 70, 1, 60, 0)
    machine.arrive([2] * 70, 1, 60, 0)
    while not machine.scheduler.preemptions:
        machine.step()
    if event == "restart":
        machine.refresh(restart=True)
    else:
        machine.refresh(restart=False)
        machine.lose()
    assert machine.scheduler.versions() == {1}
    for _ in range(300):
        machine.step()
    assert len(machine.finished) == 2


def test_priority_goes_first_and_waiting_counts() -> None:
    machine = Machine(EngineConfig(max_batch_size=1, token_budget=64), 1, Random(0))
    for priority in (0, 0, 1, -1):
        machine.arrive([1, 2], 1, 2, priority)
    for _ in range(20):
        machine.step()
    assert [entry.rank for entry in machine.finished] == [(-1, 4), (0, 1), (0, 2), (1, 3)]


def test_bounds_of_an_engine() -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_batch_size=0 must be at least 1"):
        EngineConfig(max_batch_size=0)
    with pytest.raises(ConfigError, match=r"engine\.max_queue=-1 must be at least 0"):
        EngineConfig(max_queue=-1)
    with pytest.raises(ConfigError, match=r"engine\.token_budget=8 must be at least"):
        EngineConfig(token_budget=8)
    with pytest.raises(ConfigError, match=r"engine\.kv_tokens=100 must be at least the context of"):
        EngineConfig(kv_tokens=100).blocks(160)
