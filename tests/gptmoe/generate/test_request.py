"""What a request may ask for; every refusal names its field."""

import math
from typing import Any

import pytest

from gptmoe.errors import RequestError
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request, make_request
from tests.characters import Characters


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", "warm", "temperature must be a number; found 'warm'"),
        ("top_p", None, "top_p must be a number; found None"),
        ("repetition_penalty", True, "repetition_penalty must be a number; found True"),
        ("top_k", 2.5, "top_k must be a whole number; found 2.5"),
        ("seed", "7", "seed must be a whole number; found '7'"),
        ("max_new_tokens", True, "max_new_tokens must be a whole number; found True"),
        ("ignore_end", 1, "ignore_end must be true or false; found 1"),
        ("logprobs", "yes", "logprobs must be true or false; found 'yes'"),
        ("stop", "。", "stop must be a tuple of strings; found '。'"),
        ("stop", (1,), "stop must be a tuple of strings; found (1,)"),
        ("temperature", -0.1, "temperature must be between 0 (greedy) and 100; found -0.1"),
        ("temperature", math.nan, "temperature must be between 0 (greedy) and 100; found nan"),
        ("temperature", math.inf, "temperature must be between 0 (greedy) and 100; found inf"),
        ("top_k", -1, "top_k must be at least 0 (0 = all tokens); found -1"),
        ("top_p", 0.0, "top_p must be above 0 and at most 1; found 0.0"),
        ("top_p", 1.1, "top_p must be above 0 and at most 1; found 1.1"),
        (
            "repetition_penalty",
            0.0,
            "repetition_penalty must be above 0 and at most 100 (1 = off); found 0.0",
        ),
        ("max_new_tokens", 0, "max_new_tokens must be at least 1; found 0"),
        ("max_new_tokens", -5, "max_new_tokens must be at least 1; found -5"),
        ("seed", 2**63, f"seed must be a 64-bit whole number; found {2**63}"),
        ("stop", ("a",) * 17, "stop must be at most 16 of them; found 17"),
        (
            "stop",
            ("a", ""),
            "stop must be strings of at least one character; found an empty string",
        ),
    ],
)
def test_out_of_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert str(caught.value) == message
    assert caught.value.field == field


ROOM = "to leave room for one more in the context of 8"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt must be at least one character; found an empty text"),
        ("\ud800", "prompt is not valid Unicode text; send UTF-8 without lone surrogates"),
        ("字" * 8, f"prompt must be at most 7 tokens, {ROOM}; found 8 tokens"),
        ("字" * 600, f"prompt must be at most 7 tokens, {ROOM}; found 600 characters"),
    ],
)
def test_bad_prompts(prompt: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_request(Characters(), 8, "a", prompt, SamplingParams())
    assert str(caught.value) == message
    assert caught.value.field == "prompt"


def test_a_good_prompt() -> None:
    made = make_request(Characters(), 8, "a", "春风", SamplingParams())
    assert made == Request("a", (ord("春"), ord("风")), SamplingParams())


def test_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy
