"""Who runs, who waits, who is put off: checked against a cache that remembers tokens."""

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import ConfigError
from gptmoe.generate.plan import Progress, Span, StepPlan, plan_step, share_out
from gptmoe.generate.scheduler import EngineConfig, Entry, Lane, Scheduler
from gptmoe.generate.slots import BLOCK, Copy

CONTEXT = 160


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


class Cache:
    """What is in each slot, as tokens. A plan that relies on anything else is wrong."""

    def __init__(self, slots: int, banks: int) -> None:
        self.slots = [list[int]() for _ in range(slots)]
        self.banks = banks

    def run(self, plan: StepPlan, tokens: dict[str, list[int]]) -> None:
        for copy in plan.copies:
            assert copy.source % self.banks == copy.target % self.banks
            assert copy.source != copy.target
            assert len(self.slots[copy.source]) >= copy.count
            self.slots[copy.target] = self.slots[copy.source][: copy.count]
        assert len({span.slot for span in plan.spans}) == len(plan.spans)
        for span in plan.spans:
            mine, slot = tokens[span.key], self.slots[span.slot]
            assert slot[: span.start] == mine[: span.start]
            self.slots[span.slot] = mine[: span.start + span.count]


class Machine:
    """A scheduler, the cache that it believes in, and entries that grow at random."""

    def __init__(self, config: EngineConfig, banks: int, random: Random) -> None:
        self.scheduler = Scheduler(config, CONTEXT, banks)
        self.cache = Cache(config.max_batch_size, banks)
        self.random = random
        self.left = dict[str, int]()
        """Tokens to go, by lane."""
        self.count = 0
        self.finished = list[Entry]()
        self.entries = list[Entry]()

    def arrive(self, prompt: Sequence[int], lanes: int, new: int, priority: int) -> None:
        self.count += 1
        keys = [f"{index}/{self.count}" for index in range(lanes)]
        made = [Lane(key, list(prompt), idle=index > 0) for index, key in enumerate(keys)]
        self.left |= {key: self.random.randint(1, new) if lanes > 1 else new for key in keys}
        entry = Entry((priority, self.count), made)
        self.entries.append(entry)
        self.scheduler.add(entry)

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        lanes = {lane.key: lane for entry in self.scheduler.running for lane in entry.live}
        self.cache.run(plan, {key: lane.tokens for key, lane in lanes.items()})
        self.scheduler.computed(plan)
        for entry in list(self.scheduler.running):
            self._grow(entry)
        self.check(plan)
        return plan

    def _grow(self, entry: Entry) -> None:
        """Each lane whose tokens are computed gets another, or ends."""
        if len(entry.live) > 1 and entry.live[1].idle:
            first = entry.live[0]
            if first.computed == len(first.tokens):
                self.scheduler.branch(entry, [first] * len(entry.live))
        for lane in list(entry.live):
            if lane.idle or lane.computed != len(lane.tokens):
                continue
            self.left[lane.key] -= 1
            lane.tokens.append(self.random.randrange(3))
            if not self.left[lane.key] or len(lane.tokens) >= CONTEXT:
                self.scheduler.end(entry, lane)
        if not entry.live:
            self.finished.append(entry)

    def check(self, plan: StepPlan) -> None:
        scheduler, config = self.scheduler, self.scheduler.config
        assert sum(span.count for span in plan.spans) <= config.token_budget
        held = [lane.slot for entry in scheduler.running for lane in entry.live]
        assert len(set(held)) == len(held)
        assert scheduler.pool.num_free == config.max_batch_size - len(held)
        blocks = scheduler.pool.blocks
        assert scheduler.pool.used_blocks <= blocks
        assert [entry.rank for entry in scheduler.running] == sorted(
            entry.rank for entry in scheduler.running
        )


SHAPES = ((4, 1, 0), (4, 1, CONTEXT + BLOCK), (8, 2, 400), (8, 2, 0), (3, 1, 250))
"""Slots, banks, kv_tokens."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_arrivals_cancels_and_finishes(seed: int, shape: tuple[int, int, int]) -> None:
    slots, banks, kv_tokens = shape
    random = Random(seed)
    budget = random.randint(slots, 100)
    config = EngineConfig(max_batch_size=slots, token_budget=budget, kv_tokens=kv_tokens)
    machine = Machine(config, banks, random)
    scheduler = machine.scheduler
    for _ in range(400):
        match random.choices(("arrive", "step", "cancel", "lost"), (6, 12, 1, 0.2))[0]:
            case "arrive":
                arrive_somehow(machine, random)
            case "step":
                machine.step()
            case "cancel" if alive := scheduler.waiting + scheduler.running:
                gone = random.choice(alive)
                scheduler.remove(gone)
                machine.entries.remove(gone)
            case "lost":
                scheduler.compute_again()
                machine.cache = Cache(slots, banks)
    while scheduler.waiting or scheduler.running:
        assert machine.step().spans, "somebody always gets on"
    assert {id(entry) for entry in machine.finished} == {id(entry) for entry in machine.entries}
    assert scheduler.pool.used_blocks == 0
    assert scheduler.pool.num_free == slots
    assert scheduler.prefix_hits > 0
    if kv_tokens:
        assert scheduler.preemptions > 0


def arrive_somehow(machine: Machine, random: Random) -> None:
    """A prompt that shares its beginning with others, for one to four lanes."""
    length, new = random.randint(1, 120), random.randint(1, 40)
    blocks = -(-min(CONTEXT, length + new) // BLOCK)
    pool = machine.scheduler.pool
    most = min(machine.scheduler.most_lanes(), pool.blocks // blocks)
    lanes = min(random.choice((1, 1, 1, 2, 3, 4)), most)
    prompt = [random.randrange(2)] * random.randint(0, length) + [random.randrange(5, 9)] * length
    machine.arrive(prompt[:length], lanes, new, random.randint(-20, 20))


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
