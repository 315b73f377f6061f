"""How long a request waits behind more urgent ones, and how soon one that leaves makes room."""

from collections.abc import Callable

import pytest

from gptmoe.generate.engine import PRIORITY_S, Engine
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.text import Tokenizer

from .counting import FIRST, Clock, Counting

STEP_S = 1.0
SLOTS = 2
NEW = 20
CONTEXT = 64


def make(tokenizer: Tokenizer, kv_tokens: int = 0) -> tuple[Engine, Counting, Clock]:
    executor, clock = Counting(tokenizer.vocab_size), Clock()
    config = EngineConfig(max_batch_size=SLOTS, max_queue=10**6, kv_tokens=kv_tokens)
    return Engine(executor, tokenizer, CONTEXT, config, clock), executor, clock


def request(name: str, priority: int = 0, deadline_s: float | None = None) -> Request:
    sampling = SamplingParams(temperature=0, max_new_tokens=NEW)
    return Request(name, (FIRST,) * 30, sampling, priority=priority, deadline_s=deadline_s)


def begun(executor: Counting) -> list[str]:
    """Requests in the order in which they first ran."""
    keys = dict.fromkeys(span.key for plan in executor.steps for span in plan.spans)
    return [key.partition("/")[2] for key in keys]


@pytest.mark.parametrize("kv_tokens", [0, CONTEXT + 16])
@pytest.mark.parametrize("priority", [-1, -2])
def test_a_request_is_not_starved_by_urgent_ones_that_never_end(
    tokenizer: Tokenizer, priority: int, kv_tokens: int
) -> None:
    """One urgent request a step, of which a slot does one in twenty: the queue grows for ever."""
    running, executor, clock = make(tokenizer, kv_tokens)
    arrived_s = dict[str, float]()
    ended = set[str]()

    def step() -> None:
        name = f"urgent {len(arrived_s)}"
        arrived_s[name] = clock.now_s
        running.add(request(name, priority))
        ended.update(delta.request_id for delta in running.step() if delta.finish_reason)
        clock.now_s += STEP_S

    for _ in range(5):
        step()
    since_s = clock.now_s
    running.add(request("patient"))
    passes_s = since_s - priority * PRIORITY_S  # who comes later than this comes behind it
    ahead = 5 + round((passes_s - since_s) / STEP_S) + 1
    steps = 0
    while "patient" not in ended:
        step()
        steps += 1
        assert steps <= (ahead + 1) * (NEW + 1), "whoever is first in line gets on in every step"
    before = begun(executor)[: begun(executor).index("patient")]
    assert before
    assert all(arrived_s[name] <= passes_s for name in before)
    assert running.num_waiting > ahead, "arrivals have not stopped"
    assert bool(running.stats.preemptions) == bool(kv_tokens)


@pytest.mark.parametrize("leave", ["abort", "end", "deadline"])
def test_who_leaves_makes_room_within_two_steps(tokenizer: Tokenizer, leave: str) -> None:
    running, executor, clock = make(tokenizer, CONTEXT)  # blocks for one of them alone
    running.add(request("leaves", deadline_s=clock.now_s + 50))
    running.step()
    running.add(request("waits"))
    for _ in range(3):
        running.step()
    assert (running.num_running, running.num_waiting) == (1, 1)
    ways: dict[str, Callable[[], object]] = {
        "abort": lambda: running.abort("leaves"),
        "end": lambda: running.end("leaves"),
        "deadline": lambda: setattr(clock, "now_s", clock.now_s + 50),
    }
    ways[leave]()
    if leave != "deadline":  # that is seen by the next step
        assert (running.num_running, running.stats.kv_used_blocks) == (0, 0)
    before = len(executor.steps)
    running.step()
    running.step()
    for plan in executor.steps[before:]:
        assert [span.key for span in plan.spans] == ["0/waits"]
    assert len(executor.steps) == before + 2
    assert (running.num_running, running.num_waiting) == (1, 0)
    assert running.stats.kv_used_blocks == 3  # of its own tokens
