"""Prompts of a file: in an order that is cheap, with the answers in the order they came."""

from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import Overloaded, RequestError
from gptmoe.generate.offline import bucket, in_buckets, run
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.loaded import LoadedModel
from gptmoe.text import Tokenizer

from .counting import FIRST, Counting, engine


def request(name: int, prompt: int, new: int) -> Request:
    return Request(str(name), (1,) * prompt, SamplingParams(max_new_tokens=new))


def test_buckets_double() -> None:
    assert [bucket(tokens) for tokens in (1, 32, 33, 64, 65, 128, 129)] == [0, 0, 1, 1, 2, 2, 3]


def test_the_longest_go_first_and_equals_together() -> None:
    lengths = [(10, 10), (500, 10), (12, 300), (480, 20), (20, 290)]
    requests = [request(index, *pair) for index, pair in enumerate(lengths)]
    assert [r.request_id for r in in_buckets(requests)] == ["2", "4", "1", "3", "0"]


@given(st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), max_size=20))
def test_no_request_is_lost(lengths: list[tuple[int, int]]) -> None:
    requests = [request(index, *pair) for index, pair in enumerate(lengths)]
    ordered = in_buckets(requests)
    assert sorted(map(id, ordered)) == sorted(map(id, requests))
    keys = [(bucket(r.sampling.max_new_tokens), bucket(len(r.prompt_ids))) for r in ordered]
    assert keys == sorted(keys, reverse=True)


def test_each_prompt_gets_its_own_answer(make_model: Callable[..., LoadedModel]) -> None:
    loaded = make_model(torch.float32, True, True)
    prompts = ["春风" * count for count in (1, 20, 3, 14, 7)] * 8
    texts = loaded.generate(prompts, temperature=0, max_new_tokens=4)
    assert texts[:5] == [
        loaded.generate(prompt, temperature=0, max_new_tokens=4) for prompt in prompts[:5]
    ]
    assert texts == texts[:5] * 8


def test_a_file_goes_through_one_engine_in_the_order_of_buckets(tokenizer: Tokenizer) -> None:
    random = Random(1)
    requests = [
        Request(
            str(index),
            (FIRST,) * random.randint(1, 150),
            SamplingParams(temperature=0, max_new_tokens=random.randint(1, 100)),
        )
        for index in range(200)
    ]
    running = engine(tokenizer, max_seq_len=300, max_batch_size=4, max_queue=4)
    executor = running.executor
    assert isinstance(executor, Counting)
    said, most_waiting = {}, 0
    for name, deltas in run(running, requests):
        said[name] = [token - FIRST for delta in deltas for token in delta.token_ids]
        most_waiting = max(most_waiting, running.num_waiting)
    assert said == {
        r.request_id: list(range(1, r.sampling.max_new_tokens + 1)) for r in requests
    }  # fmt: skip
    begun = dict.fromkeys(span.key for plan in executor.steps for span in plan.spans)
    assert list(begun) == [f"0/{r.request_id}" for r in in_buckets(requests)]
    last = next(n for n, plan in enumerate(executor.steps) if plan.spans[-1].key == [*begun][-1])
    assert all(len(plan.spans) == 4 for plan in executor.steps[:last]), "no step has an idle slot"
    assert most_waiting <= 4


def test_each_is_told_when_it_has_ended(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_batch_size=2)
    sampling = [
        SamplingParams(temperature=temperature, max_new_tokens=new, n=n)
        for new, n, temperature in ((2, 1, 0.0), (40, 1, 0.0), (7, 2, 1.0), (3, 1, 0.0))
    ]
    requests = [Request(str(params.max_new_tokens), (FIRST,), params) for params in sampling]
    ended = []
    for name, deltas in run(running, requests):
        ended.append(name)
        assert sum(bool(delta.finish_reason) for delta in deltas) == (2 if name == "7" else 1)
    assert ended == ["2", "40", "7", "3"]  # the longest began first; two answers want both slots


def test_a_queue_without_room_for_a_batch_is_full(tokenizer: Tokenizer) -> None:
    running = engine(tokenizer, max_batch_size=4, max_queue=0)
    with pytest.raises(Overloaded):
        list(run(running, [request(index, 5, 9) for index in range(20)]))


def test_a_file_s_answers_are_those_of_one_by_one(make_model: Callable[..., LoadedModel]) -> None:
    loaded = make_model(torch.float32, True, True)
    random = Random(2)
    texts = ["春风又绿江南岸明月何时照我还"[: random.randint(1, 14)] for _ in range(80)]
    sampling = [SamplingParams(max_new_tokens=random.randint(1, 12), seed=3) for _ in texts]
    done = dict(loaded.generate_each(texts, sampling))
    assert sorted(done) == list(range(80))
    for index in range(0, 80, 6):
        most = sampling[index].max_new_tokens
        assert done[index] == loaded.generate(texts[index], max_new_tokens=most, seed=3)


def test_a_text_that_is_refused_is_refused_before_the_first_answer(
    make_model: Callable[..., LoadedModel],
) -> None:
    loaded = make_model(torch.float32, True, True)
    with pytest.raises(RequestError, match="prompt must be at least one character"):
        loaded.generate_each(["春风", ""], [SamplingParams()] * 2)
