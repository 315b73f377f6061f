"""Prompts of a file: in an order that is cheap, with the answers in the order they came."""

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.generate.offline import bucket, in_buckets
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.loaded import LoadedModel


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
