"""What a request may ask for; every refusal names its field."""

from typing import Any

import pytest

from gptmoe.errors import RequestError
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request, make_request
from tests.characters import Characters

ROOM = "to leave room for one more in the context of 8"
PLAIN = SamplingParams()
HUGE = 10**5000
"""Python refuses to write it."""


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def refusal(prompt: Any, sampling: SamplingParams = PLAIN, **given: Any) -> tuple[str, str]:
    """Field and message."""
    with pytest.raises(RequestError) as caught:
        make_request(Characters(), 8, given.pop("request_id", "a"), prompt, sampling, **given)
    return caught.value.field, str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt must be at least one character; found an empty text"),
        ([], "prompt must be at least one token; found no tokens"),
        ("\ud800", "prompt is not valid Unicode text; send UTF-8 without lone surrogates"),
        ("字" * 8, f"prompt must be at most 7 tokens, {ROOM}; found 8 tokens"),
        ([5] * 10**6, f"prompt must be at most 7 tokens, {ROOM}; found 1000000 tokens"),
        ("字" * 600, f"prompt must be at most 7 tokens, {ROOM}; found 600 characters"),
    ],
    ids=lambda it: str(it)[:20],
)
def test_bad_prompts(prompt: Any, message: str) -> None:
    assert refusal(prompt) == ("prompt", message)


@pytest.mark.parametrize("field", ["prompt_token_ids", "resume_token_ids"])
def test_bad_tokens(field: str) -> None:
    for wrong in (-1, 0x110000, 1.5, "5", None, True, HUGE):
        prompt, resume = ([3, wrong], ()) if field == "prompt_token_ids" else ([3], [wrong])
        found = "a number of thousands of digits" if wrong == HUGE else f"[{wrong!r}]"
        message = f"{field} must be token ids from 0 to 1114111; found {found}"
        assert refusal(prompt, resume_ids=resume) == (field, message)


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (SamplingParams(stop_token_ids=(0x110000,)), "stop_token_ids"),
        (SamplingParams(logit_bias=((0x110000, 1.0),)), "logit_bias"),
    ],
)
def test_tokens_outside_the_vocabulary(sampling: SamplingParams, field: str) -> None:
    message = f"{field} must be token ids from 0 to 1114111; found [1114112]"
    assert refusal("春", sampling) == (field, message)


ENDED = "resume_token_ids must be those of an answer that has not ended; found"


@pytest.mark.parametrize(
    ("sampling", "resume", "message"),
    [
        (
            SamplingParams(max_new_tokens=2),
            "明月",
            "resume_token_ids must be fewer than max_new_tokens and what the context has room for: "
            "2; found 2 tokens",
        ),
        (
            PLAIN,
            "明月明月明月",
            "resume_token_ids must be fewer than max_new_tokens and what the context has room for: "
            "6; found 6 tokens",
        ),
        (
            SamplingParams(n=2),
            "明",
            "resume_token_ids must be empty with n or num_beams above 1; found tokens",
        ),
        (
            SamplingParams(num_beams=2, temperature=0),
            "明",
            "resume_token_ids must be empty with n or num_beams above 1; found tokens",
        ),
        (PLAIN, "明\0", f"{ENDED} the end token 0"),
        (PLAIN, "明\1月", f"{ENDED} the end token 1"),
        (SamplingParams(stop_token_ids=(0x6708,)), "明月", f"{ENDED} the end token 26376"),
        (SamplingParams(stop=("月江",)), "明月江上", f"{ENDED} a whole stop string"),
    ],
)
def test_bad_places_to_go_on_from(sampling: SamplingParams, resume: str, message: str) -> None:
    answer = refusal("春风", sampling, resume_ids=ids(resume))
    assert answer == ("resume_token_ids", message)


def test_a_request_that_goes_on() -> None:
    sampling = SamplingParams(stop=("月江",), ignore_end=True)
    made = make_request(Characters(), 8, "a", "春风", sampling, resume_ids=ids("明\0月"))
    assert made.resume_ids == tuple(ids("明\0月"))


def test_bad_priorities() -> None:
    for priority in (-101, 101, True, 1.5, "1", None, HUGE):
        field, message = refusal("春", priority=priority)
        assert field == "priority"
        assert message.startswith("priority must be a whole number between -100 and 100; found ")


def test_a_long_name_is_refused() -> None:
    message = "request_id must be at most 200 characters; found 201 characters"
    assert refusal("春", request_id="a" * 201) == ("request_id", message)


def test_a_good_prompt() -> None:
    made = make_request(Characters(), 8, "a", "春风", PLAIN)
    assert made == Request("a", tuple(ids("春风")), PLAIN)
    asked = SamplingParams(prompt_logprobs=True)
    made = make_request(Characters(), 8, "b", ids("春"), asked, priority=-100, deadline_s=2.5)
    wanted = Request("b", (ord("春"),), asked, priority=-100, deadline_s=2.5, score_from=1)
    assert made == wanted
