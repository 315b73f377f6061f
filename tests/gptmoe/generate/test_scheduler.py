"""Who runs how many tokens in the next step."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import ConfigError
from gptmoe.generate.scheduler import EngineConfig, Progress, Span, StepPlan, plan_step


def test_decoding_comes_first_and_prompts_share_what_is_left() -> None:
    running = [Progress("a", 0, 10, 0), Progress("b", 1, 7, 6), Progress("c", 2, 20, 5)]
    assert plan_step(running, token_budget=13) == StepPlan(
        spans=(
            Span("b", 1, start=6, count=1, samples=True),
            Span("a", 0, start=0, count=10, samples=True),
            Span("c", 2, start=5, count=2, samples=False),
        ),
        num_decoding=1,
    )


def test_nothing_to_run() -> None:
    assert plan_step([], token_budget=8) == StepPlan((), 0)


def test_a_prompt_of_one_token_decodes() -> None:
    assert plan_step([Progress("a", 0, 1, 0)], 8).num_decoding == 1


progress = st.tuples(st.integers(1, 60), st.integers(0, 59)).filter(lambda pair: pair[1] < pair[0])


@given(st.lists(progress, max_size=12), st.integers(1, 64))
def test_budget_order_and_what_samples(pairs: list[tuple[int, int]], budget: int) -> None:
    running = [Progress(str(i), i, known, done) for i, (known, done) in enumerate(pairs)]
    plan = plan_step(running, budget)
    decoding, chunks = plan.spans[: plan.num_decoding], plan.spans[plan.num_decoding :]
    by_id = {p.request_id: p for p in running}
    assert [s.request_id for s in decoding] == [
        p.request_id for p in running if p.known - p.computed == 1
    ]
    assert sum(span.count for span in chunks) <= max(0, budget - len(decoding))
    assert [s.slot for s in chunks] == sorted(s.slot for s in chunks)  # in order of arrival
    for span in plan.spans:
        owner = by_id[span.request_id]
        assert span.start == owner.computed
        assert 0 < span.count <= owner.known - owner.computed
        assert span.samples == (span.start + span.count == owner.known)
    if any(p.known - p.computed > 1 for p in running) and budget > len(decoding):
        assert chunks  # the oldest prompt always gets on


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 20), st.randoms())
def test_nobody_starves_and_the_budget_is_kept(
    prompts: list[int], spare: int, random: Random
) -> None:
    """Each step every sequence in line gets on, or an older prompt fills the budget."""
    budget = len(prompts) + spare
    slots = random.sample(range(20), len(prompts))
    known, computed = dict(enumerate(prompts)), dict.fromkeys(range(len(prompts)), 0)
    for _ in range(sum(prompts) + 10):
        running = [Progress(str(i), slots[i], known[i], computed[i]) for i in known]
        plan = plan_step(running, budget)
        assert sum(span.count for span in plan.spans) <= budget
        decoding = [span.slot for span in plan.spans[: plan.num_decoding]]
        assert decoding == sorted(p.slot for p in running if p.known - p.computed == 1)
        prompts_left = [p.request_id for p in running if p.known - p.computed > 1]
        chunks = [span.request_id for span in plan.spans[plan.num_decoding :]]
        assert chunks == prompts_left[: len(chunks)]
        assert bool(chunks) == bool(prompts_left)
        if len(chunks) < len(prompts_left):
            assert sum(span.count for span in plan.spans) == budget
        for span in plan.spans:
            computed[int(span.request_id)] += span.count
            known[int(span.request_id)] += span.samples
    assert all(known[i] - computed[i] == 1 for i in known)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_batch_size": 0}, "engine.max_batch_size=0 must be at least 1"),
        ({"max_queue": -1}, "engine.max_queue=-1 must be at least 0"),
        (
            {"token_budget": 7, "max_batch_size": 8},
            "engine.token_budget=7 must be at least engine.max_batch_size=8: "
            "every sequence runs a token a step",
        ),
    ],
)
def test_bad_bounds(keys: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        EngineConfig(**keys)
