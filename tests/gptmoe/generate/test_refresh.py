"""Newer weights under running requests: who uses which, and when the old ones are let go of."""

from gptmoe.generate.delta import Delta
from gptmoe.generate.engine import Engine
from gptmoe.text import Tokenizer

from .counting import FIRST, Counting, engine, request, run_out


def test_running_requests_finish_on_their_weights(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    executor = running.executor
    assert isinstance(executor, Counting)
    running.add(request("old"))
    deltas = running.step()
    running.refresh(1)
    running.add(request("new", max_new_tokens=2))
    deltas += run_out(running)
    assert {(delta.request_id, delta.version) for delta in deltas} == {("old", 0), ("new", 1)}
    assert [plan.version for plan in executor.steps] == [0, 1, 0, 1, 0]
    assert executor.kept == [{0, 1}, {1}]


def test_an_ended_request_says_its_weights(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    running.refresh(3)
    running.add(request("runs"))
    running.step()
    running.add(request("waits"))
    assert [delta.version for delta in running.end("runs")] == [3]
    assert [delta.version for delta in running.end("waits")] == [0], "it has none yet"


def test_running_requests_go_on_with_new_weights_if_told_so(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    executor = running.executor
    assert isinstance(executor, Counting)
    running.add(request("a"))
    deltas = running.step()
    running.refresh(1, restart=True)
    deltas += run_out(running)
    assert [delta.version for delta in deltas] == [0, 1, 1]
    assert [delta.token_ids[0] - FIRST for delta in deltas] == [1, 2, 3]
    assert executor.steps[1].spans[0].start == 0  # computed again from the first token
    assert executor.kept == [{1}]


def put_off(tokenizer: Tokenizer) -> tuple[Engine, list[Delta]]:
    """An engine in which "late" waits again, after some tokens; newer weights count by two."""
    running = engine(tokenizer, max_batch_size=2, kv_tokens=64)
    executor = running.executor
    assert isinstance(executor, Counting)
    executor.strides[1] = 2
    deltas = []
    for name in ("first", "late"):
        running.add(request(name, [FIRST] * 9, max_new_tokens=50))
    while not running.stats.preemptions:
        deltas += running.step()
    assert (running.num_running, running.num_waiting) == (1, 1)
    return running, deltas


def said(deltas: list[Delta], name: str) -> list[int]:
    return [token - FIRST for d in deltas if d.request_id == name for token in d.token_ids]


def test_who_was_put_off_finishes_on_the_weights_it_began_with(tokenizer: Tokenizer) -> None:
    running, deltas = put_off(tokenizer)
    assert len(said(deltas, "late")) > 10
    running.refresh(1)
    running.add(request("new", max_new_tokens=3))
    deltas += run_out(running)
    assert said(deltas, "late") == list(range(1, 51))
    assert {d.version for d in deltas if d.request_id == "late"} == {0}
    assert said(deltas, "new") == [2, 4, 6]
    executor = running.executor
    assert isinstance(executor, Counting)
    assert executor.kept[0] == {0, 1}
    assert executor.kept[-1] == {1}


def test_weights_of_who_was_put_off_are_let_go_of_when_it_is_aborted(tokenizer: Tokenizer) -> None:
    running, _ = put_off(tokenizer)
    running.refresh(1)
    assert running.abort("first")
    executor = running.executor
    assert isinstance(executor, Counting)
    assert executor.kept[-1] == {0, 1}
    assert running.abort("late")
    assert executor.kept[-1] == {1}


def test_who_was_put_off_goes_on_with_new_weights_if_told_so(tokenizer: Tokenizer) -> None:
    running, deltas = put_off(tokenizer)
    before = said(deltas, "late")
    running.refresh(1, restart=True)
    deltas += run_out(running)
    assert said(deltas, "late")[: len(before) + 2] == [*before, before[-1] + 2, before[-1] + 4]
    executor = running.executor
    assert isinstance(executor, Counting)
    assert executor.kept == [{1}]
