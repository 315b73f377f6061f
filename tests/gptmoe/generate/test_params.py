"""What sampling parameters may be; every refusal names its field."""

import math
import pickle
from dataclasses import fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import RequestError
from gptmoe.generate.params import SamplingParams, as_params, biases

HUGE = 10**5000
"""Python refuses to write it."""

NUMBERS = {
    "temperature": ([0, 100], [-0.1, 100.1], "between 0 (greedy) and 100"),
    "top_p": ([1e-300, 1], [0.0, -1, 1.1], "above 0 and at most 1"),
    "min_p": ([0, 1], [-0.1, 1.1], "between 0 (off) and 1"),
    "repetition_penalty": ([1e-300, 100], [0.0, -1, 101], "above 0 and at most 100 (1 = off)"),
    "presence_penalty": ([-100, 100], [-101, 101], "between -100 and 100 (0 = off)"),
    "frequency_penalty": ([-100, 100], [-101, 101], "between -100 and 100 (0 = off)"),
    "diversity_penalty": ([0, 1e6], [-0.1, 1e7], "between 0 (off) and 1000000"),
    "length_penalty": ([-10, 10], [-11, 11], "between -10 and 10 (0 = off)"),
}
WHOLE = {
    "top_k": ([0, 2**62], [-1], "at least 0 (0 = all tokens)"),
    "seed": ([-(2**63), 2**63 - 1], [], ""),
    "n": ([1, 16], [0, -1, 17], "between 1 and 16"),
    "num_beams": ([1], [0, -1, 17], "between 1 (no search) and 16"),
    "num_beam_groups": ([1], [0, 17], "between 1 and 16"),
    "max_new_tokens": ([1, 2**62], [0, -5], "at least 1"),
    "top_logprobs": ([0, 20], [-1, 21], "between 0 and 20"),
}
SWITCHES = ["ignore_end", "logprobs", "prompt_logprobs"]
TUPLES = {
    "stop": "a tuple of strings",
    "stop_token_ids": "a tuple of token ids",
    "logit_bias": "pairs of a token id and a number",
}


def refusal(**given: Any) -> str:
    """The message that these parameters get; it names the field twice."""
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)
    message = str(caught.value)
    assert message.startswith(f"{caught.value.field} must be ")
    assert len(message) < 300
    return message


def test_these_are_all_fields() -> None:
    named = {*NUMBERS, *WHOLE, *SWITCHES, *TUPLES}
    assert {field.name for field in fields(SamplingParams)} == named


@pytest.mark.parametrize("name", [*NUMBERS, *WHOLE])
def test_ranges(name: str) -> None:
    least_and_most, outside, wanted = (NUMBERS | WHOLE)[name]
    for value in least_and_most:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in outside:
        assert refusal(**{name: value}) == f"{name} must be {wanted}; found {value}"


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number(name: str) -> None:
    for value, found in (("warm", "'warm'"), (None, "None"), (True, "True"), (1j, "1j")):
        assert refusal(**{name: value}) == f"{name} must be a number; found {found}"
    for value in (math.nan, math.inf, -math.inf):
        assert refusal(**{name: value}) == f"{name} must be {NUMBERS[name][2]}; found {value}"
    for value in (HUGE, -HUGE):
        assert refusal(**{name: value}).endswith("found a number of thousands of digits")


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_whole_number(name: str) -> None:
    for value, found in ((2.5, "2.5"), (math.nan, "nan"), ("7", "'7'"), (True, "True"), ([], "[]")):
        assert refusal(**{name: value}) == f"{name} must be a whole number; found {found}"
    for value in (2**63, -(2**63) - 1):
        wanted = f"{name} must be a 64-bit whole number; found {value}"
        assert refusal(**{name: value}) == wanted
    found = "a number of thousands of digits"
    assert refusal(**{name: HUGE}) == f"{name} must be a 64-bit whole number; found {found}"


@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_no_switch(name: str) -> None:
    assert getattr(SamplingParams(**{name: True}), name) is True
    for value, found in ((1, "1"), ("yes", "'yes'"), (None, "None")):
        assert refusal(**{name: value}) == f"{name} must be true or false; found {found}"


@pytest.mark.parametrize("name", TUPLES)
def test_what_is_no_tuple(name: str) -> None:
    for value, found in (("。", "'。'"), ([], "[]"), (None, "None"), ((1.5,), "(1.5,)")):
        assert refusal(**{name: value}) == f"{name} must be {TUPLES[name]}; found {found}"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"stop": (1,)}, "stop must be a tuple of strings; found (1,)"),
        ({"stop": ("a", "")}, "stop must be strings of at least one character; found an empty s"),
        ({"stop": ("a",) * 17}, "stop must be at most 16 of them; found 17"),
        ({"stop": ("停",) * 10_000}, "stop must be at most 16 of them; found 10000"),
        ({"stop": ("a" * 1001,)}, "stop must be strings of at most 1000 characters; found one of"),
        ({"stop": ("\ud800",)}, "stop must be valid Unicode without lone surrogates; found '\\ud8"),
        ({"stop_token_ids": (True,)}, "stop_token_ids must be a tuple of token ids; found (True,)"),
        ({"stop_token_ids": (3, -1)}, "stop_token_ids must be token ids of at least 0; found -1"),
        (
            {"stop_token_ids": (-HUGE,)},
            "stop_token_ids must be token ids of at least 0; found a nu",
        ),
        ({"stop_token_ids": ("1",)}, "stop_token_ids must be a tuple of token ids; found ('1',)"),
        ({"stop_token_ids": (1,) * 17}, "stop_token_ids must be at most 16 of them; found 17"),
        ({"logit_bias": ((1,),)}, "logit_bias must be pairs of a token id and a number; found ((1"),
        ({"logit_bias": ((-1, 0.0),)}, "logit_bias must be of token ids of at least 0; found -1"),
        ({"logit_bias": (("1", 0),)}, "logit_bias must be of token ids of at least 0; found '1'"),
        (
            {"logit_bias": ((1, 101),)},
            "logit_bias must be of numbers between -100 and 100; found 1",
        ),
        (
            {"logit_bias": ((1, math.nan),)},
            "logit_bias must be of numbers between -100 and 100; fo",
        ),
        (
            {"logit_bias": ((1, True),)},
            "logit_bias must be of numbers between -100 and 100; found T",
        ),
        (
            {"logit_bias": ((1, HUGE),)},
            "logit_bias must be of numbers between -100 and 100; found a",
        ),
        (
            {"logit_bias": ((1, 1), (1, 2))},
            "logit_bias must be one number a token; found a token t",
        ),
        (
            {"logit_bias": tuple((token, 0.0) for token in range(1025))},
            "logit_bias must be at most 1024 tokens; found 1025",
        ),
        (
            {"num_beams": 2},
            "num_beams must be 1 unless temperature is 0: beams are not drawn; found",
        ),
        ({"num_beams": 2, "temperature": 0, "n": 3}, "n must be at most num_beams=2; found 3"),
        (
            {"num_beams": 4, "temperature": 0, "num_beam_groups": 3},
            "num_beam_groups must be a divisor of num_beams=4; found 3",
        ),
        ({"num_beam_groups": 2}, "num_beam_groups must be 1 without num_beams; found 2"),
        (
            {"temperature": 0, "n": 2},
            "n must be 1 where temperature is 0 and num_beams is 1: all answers would be the same",
        ),
    ],
)
def test_refusals(asked: dict[str, Any], message: str) -> None:
    assert refusal(**asked).startswith(message)


@given(
    st.sampled_from([field.name for field in fields(SamplingParams)]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    ),
)
def test_whatever_is_sent_is_taken_or_refused(name: str, value: Any) -> None:
    """Nothing but a RequestError about that field comes of any value."""
    outcome = taken(name, value)
    if isinstance(outcome, RequestError):
        assert outcome.field == name
        assert name in str(outcome)
    else:
        assert pickle.loads(pickle.dumps(outcome)) == outcome
        assert hash(outcome) == hash(taken(name, value))


def taken(name: str, value: Any) -> SamplingParams | RequestError:
    try:
        return as_params({name: value})
    except RequestError as error:
        return error


def test_numbers_of_other_kinds_become_plain_ones() -> None:
    """So that equal parameters are equal keys, and cross processes without numpy."""
    given = SamplingParams(
        temperature=Fraction(1, 2),  # type: ignore[arg-type]
        top_p=np.float64(0.5),
        top_k=np.int64(7),  # type: ignore[arg-type]
    )
    assert given == SamplingParams(temperature=0.5, top_p=0.5, top_k=7)
    assert [type(value) for value in (given.temperature, given.top_p)] == [float, float]
    assert type(given.top_k) is int


def test_keywords_as_people_write_them() -> None:
    wanted = SamplingParams(
        stop=("。",), stop_token_ids=(5,), logit_bias=((3, -1.0), (20, 2.5)), top_k=2
    )
    given = {"stop": "。", "stop_token_ids": 5, "logit_bias": {"20": 2.5, 3: -1.0}, "top_k": 2}
    assert as_params(given) == wanted
    lists = {"stop": ["。"], "stop_token_ids": [5], "logit_bias": {3: -1.0, 20: 2.5}, "top_k": 2}
    assert as_params(lists) == wanted
    assert as_params({}) == SamplingParams()


def test_an_unknown_keyword_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^unknown sampling parameter topk; known: temperature"):
        as_params({"topk": 3})


@pytest.mark.parametrize("key", ["春", "1.5", "-1", "", "²", "1" * 30, 1.5, None, True, (1,)])
def test_a_bias_of_no_token_is_refused(key: object) -> None:
    with pytest.raises(RequestError) as caught:
        biases({key: 1.0, 2: 1.0})
    assert str(caught.value) == f"logit_bias must be of token ids; found {key!r}"
    assert caught.value.field == "logit_bias"


def test_a_token_in_two_spellings_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^logit_bias must be one number a token"):
        as_params({"logit_bias": {"3": 1.0, 3: 2.0}})


def test_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy
