"""The engine's accounting, over a model that counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import AlreadyRunning, Overloaded, RequestError
from gptmoe.generate.delta import Delta
from gptmoe.generate.engine import Engine
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.text import Tokenizer

from .counting import FIRST, Clock, Counting, engine, request, run_out


def test_a_request_from_start_to_end(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    running.add(request("a"))
    deltas = run_out(running)
    assert [delta.token_ids for delta in deltas] == [(FIRST + 1,), (FIRST + 2,), (FIRST + 3,)]
    assert [delta.finish_reason for delta in deltas] == ["", "", "length"]
    text = "".join(delta.text for delta in deltas)
    assert text == tokenizer.decode([FIRST + 1, FIRST + 2, FIRST + 3])
    assert deltas[0].prompt_tokens == 1
    assert not running.has_work


def test_what_fills_the_context_is_scored_where_it_has_all_the_room(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_seq_len=64, max_batch_size=1)
    prompt = tuple(range(FIRST, FIRST + 64))
    running.add(Request("a", prompt, SamplingParams(), score_from=1, score_only=True))
    deltas = [delta for _ in range(10) for delta in running.step()]
    assert len(deltas[-1].prompt_scores) == 63
    assert not running.has_work


def test_a_prompt_may_be_computed_and_nothing_else(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    running.add(Request("a", (FIRST, FIRST + 1), SamplingParams(), score_only=True))
    [delta] = run_out(running)
    assert (delta.finish_reason, delta.prompt_tokens) == ("length", 2)
    assert delta.token_ids == delta.prompt_scores == ()


def test_the_likeliest_are_told_at_a_prompts_places_too(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    sampling = request("a", top_logprobs=1, prompt_logprobs=True).sampling
    running.add(Request("a", (FIRST, FIRST + 1, FIRST + 5), sampling, score_from=1))
    first, *_ = run_out(running)
    told = [(score.greedy, score.likeliest[0][0]) for score in first.prompt_scores]
    assert told == [(True, FIRST + 1), (False, FIRST + 2)]


def test_no_more_of_a_prompt_is_known_than_it_has(tokenizer: Tokenizer) -> None:
    """One that goes on behind what it has said finds that in the cache, too."""
    running = engine(tokenizer, max_seq_len=256)
    prompt = range(FIRST, FIRST + 20)
    running.add(request("a", prompt, max_new_tokens=100))
    said = tuple(token for delta in run_out(running) for token in delta.token_ids)
    sampling = request("b", prompt, max_new_tokens=110).sampling
    running.add(Request("b", tuple(prompt), sampling, resume_ids=said))
    assert run_out(running)[-1].cached_tokens == 20


@pytest.mark.parametrize("special", ["end_id", "sep_id"])
def test_end_tokens_stop_without_text(tokenizer: Tokenizer, special: str) -> None:
    end = getattr(tokenizer, special)
    for ignore_end, reasons in ((False, ["stop"]), (True, ["", "", "length"])):
        running = engine(tokenizer)
        running.add(request("a", [(end - 1) % tokenizer.vocab_size], ignore_end=ignore_end))
        deltas = run_out(running)
        assert [delta.finish_reason for delta in deltas] == reasons
        if not ignore_end:
            assert deltas[0].text == ""


def test_a_stop_string_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    stop = tokenizer.decode([FIRST + 2])
    running.add(request("a", stop=(stop,), max_new_tokens=9))
    deltas = run_out(running)
    assert deltas[-1].finish_reason == "stop"
    assert stop not in "".join(delta.text for delta in deltas)


def test_the_context_ends_the_text(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_seq_len=5)
    running.add(request("a", [FIRST] * 3, max_new_tokens=50))
    assert [delta.finish_reason for delta in run_out(running)] == ["", "length"]


def test_a_full_queue_is_refused_with_a_time(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_batch_size=1, max_queue=2)
    for name in "abc":
        running.add(request(name))
    with pytest.raises(Overloaded, match="the queue of 2 requests is full") as caught:
        running.add(request("d"))
    assert caught.value.retry_after_s > 0
    assert {delta.request_id for delta in run_out(running)} == set("abc")


def test_an_id_in_use_is_refused(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    running.add(request("a"))
    with pytest.raises(AlreadyRunning, match="request_id 'a' is running; wait for it, or use"):
        running.add(request("a"))
    running.step()
    with pytest.raises(AlreadyRunning):
        running.add(request("a"))


@pytest.mark.parametrize("tokens", [0, 64])
def test_a_prompt_that_does_not_fit_the_context_is_refused(
    tokenizer: Tokenizer, tokens: int
) -> None:
    running = engine(tokenizer, max_seq_len=64)
    with pytest.raises(RequestError, match=f"^prompt must be 1 to 63 tokens; found {tokens}$"):
        running.add(request("a", [FIRST] * tokens))
    assert not running.has_work


def test_abort_frees_the_slot_at_once(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_batch_size=1)
    running.add(request("a", max_new_tokens=40))
    running.add(request("b"))
    running.step()
    assert (running.num_running, running.num_waiting) == (1, 1)
    assert running.abort("a")
    assert not running.abort("a")
    assert {delta.request_id for delta in running.step()} == {"b"}


def test_a_waiting_request_can_be_aborted(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_batch_size=1)
    running.add(request("a"))
    running.add(request("b"))
    assert running.abort("b")
    assert {delta.request_id for delta in run_out(running)} == {"a"}


def test_logprobs_only_where_asked_for(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    running.add(request("a", logprobs=True))
    running.add(request("b"))
    running.add(request("c", top_logprobs=2))
    for delta in run_out(running):
        asked = delta.request_id != "b"
        assert len(delta.logprobs) == asked
        assert (delta.cumulative_logprob < 0) == asked


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 9), st.integers(1, 6)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@given(actions, st.integers(1, 4), st.integers(0, 8))
def test_every_request_ends_and_no_slot_is_lost(
    tokenizer: Tokenizer, actions: list[tuple[str, int, int]], slots: int, budget: int
) -> None:
    running = engine(tokenizer, max_batch_size=slots, max_queue=1000, token_budget=slots + budget)
    wanted: dict[str, int] = {}
    deltas: list[Delta] = []
    for index, (action, first, second) in enumerate(actions):
        if action == "add":
            running.add(request(str(index), [FIRST] * first, max_new_tokens=second))
            wanted[str(index)] = second
        elif action == "abort" and running.abort(str(first)):
            wanted.pop(str(first))
        else:
            deltas += running.step()
    deltas += run_out(running)
    for name, count in wanted.items():
        mine = [delta for delta in deltas if delta.request_id == name]
        assert [d.token_ids[0] for d in mine] == list(range(FIRST + 1, FIRST + 1 + count))
        assert [d.finish_reason for d in mine] == [""] * (count - 1) + ["length"]
    assert running.stats.kv_used_blocks == 0
    assert not running.has_work


def test_a_lost_cache_costs_time_and_no_token(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    executor = running.executor
    assert isinstance(executor, Counting)
    running.add(request("a", prompt=(FIRST, FIRST + 1), max_new_tokens=4))
    deltas = running.step() + running.step()
    executor.loses = True
    assert running.step() == []
    deltas += run_out(running)
    assert [delta.token_ids[0] - FIRST for delta in deltas] == [2, 3, 4, 5]
    again = executor.steps[3].spans[0]
    assert (again.start, again.count, again.outputs) == (0, 4, 1)
    assert deltas[-1].version == 7  # of the weights that were there then


def test_a_request_whose_time_is_up_ends_wherever_it_is(tokenizer: Tokenizer) -> None:
    clock = Clock()
    config = EngineConfig(max_batch_size=1)
    running = Engine(Counting(tokenizer.vocab_size), tokenizer, 64, config, clock)
    for name, deadline_s in (("runs", 101.0), ("waits", 101.0), ("later", 200.0)):
        sampling = SamplingParams(temperature=0, max_new_tokens=9)
        running.add(Request(name, (FIRST,), sampling, deadline_s=deadline_s))
    running.step()
    clock.now_s = 101.0
    late = {delta.request_id: delta for delta in running.step() if delta.finish_reason}
    assert {name: delta.finish_reason for name, delta in late.items()} == {
        "runs": "deadline",
        "waits": "deadline",
    }
    assert late["runs"].timings is not None
    assert late["runs"].timings.total_s == 1.0
    assert {delta.request_id for delta in run_out(running)} == {"later"}


def test_an_ended_request_says_so_for_each_answer_and_leaves_nothing(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    running.add(request("a", temperature=1.0, n=3, max_new_tokens=20))
    running.step()
    deltas = running.end("a")
    assert [(d.index, d.finish_reason) for d in deltas] == [(i, "abort") for i in range(3)]
    assert running.end("a") == []
    assert not running.has_work
    assert running.stats.kv_used_blocks == 0


def test_answers_that_find_no_room_at_once_are_refused(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_batch_size=4)
    with pytest.raises(RequestError, match=r"^n must be at most 4, which have room at once here"):
        running.add(request("a", temperature=1.0, n=5))
    with pytest.raises(RequestError, match=r"^num_beams must be at most 4"):
        running.add(request("a", num_beams=6))
    tight = engine(tokenizer, max_batch_size=4, kv_tokens=64)
    with pytest.raises(RequestError, match=r"^n must be at most 2"):
        tight.add(request("a", [FIRST] * 20, temperature=1.0, n=3))
    assert not running.has_work


def test_a_queue_is_full_by_tokens_too(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_batch_size=1, max_queue_tokens=30)
    running.add(request("runs", max_new_tokens=20))
    running.step()
    running.add(request("waits", [FIRST] * 10, max_new_tokens=10))
    with pytest.raises(Overloaded, match="the queue of 30 tokens is full") as caught:
        running.add(request("late", [FIRST] * 10, max_new_tokens=10))
    assert 0.1 <= caught.value.retry_after_s <= 60
    in_about = f"full; try again in about {caught.value.retry_after_s:.1f} s"
    assert str(caught.value).endswith(in_about)
    assert running.stats.refused == 1
    assert running.stats.waiting_tokens == 20


def test_priority_passes_those_who_wait(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_batch_size=1)
    for name, priority in (("runs", 0), ("waits", 0), ("urgent", -1)):
        sampling = SamplingParams(temperature=0, max_new_tokens=2)
        running.add(Request(name, (FIRST,), sampling, priority=priority))
        running.step()
    ends = [delta.request_id for delta in run_out(running) if delta.finish_reason]
    assert ends == ["urgent", "waits"]


def test_a_resumed_request_says_the_rest(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer)
    sampling = SamplingParams(temperature=0, max_new_tokens=4)
    running.add(Request("a", (FIRST,), sampling, resume_ids=(FIRST + 1, FIRST + 2)))
    deltas = run_out(running)
    assert [delta.token_ids[0] - FIRST for delta in deltas] == [3, 4]
    whole = engine(tokenizer)
    whole.add(Request("a", (FIRST,), sampling))
    sent = [delta.text for delta in run_out(whole)]
    assert [delta.text for delta in deltas] == sent[2:]
    assert deltas[-1].finish_reason == "length"


def test_numbers_of_an_engine(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_batch_size=2)
    for name in "abc":
        running.add(request(name, [FIRST] * 40, max_new_tokens=3))
    running.step()
    stats = running.stats
    assert (stats.running, stats.waiting, stats.kv_used_blocks) == (2, 1, 6)
    assert (stats.steps, stats.prompt_tokens, stats.generated_tokens) == (1, 80, 2)
    assert (stats.running_tokens, stats.waiting_tokens) == (2 * 3, 43)
    assert stats.tokens_per_s > 0
    deltas = run_out(running)
    assert running.stats.prefix_hits == 32
    assert {d.request_id: d.cached_tokens for d in deltas if d.finish_reason}["c"] == 32
