"""Answers that are kept: which, for how long, and never for another request."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import ConfigError
from gptmoe.generate.delta import Delta, Timings
from gptmoe.generate.params import SamplingParams, biases
from gptmoe.generate.request import Request
from serve.result_cache import CacheConfig, ResultCache, key_of

TOKENS = st.lists(st.integers(0, 9), max_size=4).map(tuple)

SAMPLING = {
    "temperature": st.just(0.0),
    "top_k": st.integers(0, 3),
    "top_p": st.sampled_from([0.5, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.1]),
    "repetition_penalty": st.sampled_from([1.0, 1.2]),
    "presence_penalty": st.sampled_from([0.0, 0.5]),
    "frequency_penalty": st.sampled_from([0.0, 0.5]),
    "logit_bias": st.dictionaries(st.integers(0, 3), st.just(1.0), max_size=2).map(biases),
    "seed": st.integers(0, 3),
    "n": st.just(1),
    "num_beams": st.sampled_from([2, 4]),
    "num_beam_groups": st.sampled_from([1, 2]),
    "diversity_penalty": st.sampled_from([0.0, 0.5]),
    "length_penalty": st.sampled_from([1.0, 2.0]),
    "max_new_tokens": st.integers(1, 3),
    "stop": st.lists(st.sampled_from(["。", "，", "。，"]), max_size=2).map(tuple),
    "stop_token_ids": TOKENS,
    "ignore_end": st.booleans(),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 2),
    "prompt_logprobs": st.booleans(),
}
"""What each field of SamplingParams may be: a new field has to be named here."""

OTHER = {"temperature": 0.5, "num_beams": 1, "n": 2}
"""Values for fields that have one value above, as they depend on each other."""

REQUEST = {
    "prompt_ids": TOKENS,
    "resume_ids": TOKENS,
    "score_from": st.integers(0, 2),
    "score_only": st.booleans(),
}
NO_MATTER = {
    "request_id": st.sampled_from("ab"),
    "priority": st.integers(-1, 1),
    "deadline_s": st.sampled_from([None, 5.0]),
}


def test_every_field_is_named_above() -> None:
    assert set(SAMPLING) == {field.name for field in fields(SamplingParams)}
    known = {"sampling", *REQUEST, *NO_MATTER}
    assert known == {field.name for field in fields(Request)}


REQUESTS = st.builds(
    Request, **REQUEST, **NO_MATTER, sampling=st.builds(SamplingParams, **SAMPLING)
)


@given(REQUESTS, REQUESTS, st.integers(0, 1), st.integers(0, 1))
def test_requests_share_a_key_if_all_that_matters_is_equal(
    one: Request, two: Request, version_one: int, version_two: int
) -> None:
    blank = {"request_id": "", "priority": 0, "deadline_s": None}
    same = (replace(one, **blank), version_one) == (replace(two, **blank), version_two)
    assert (key_of(one, version_one) == key_of(two, version_two)) == same


@pytest.mark.parametrize("name", SAMPLING)
@given(data=st.data())
def test_one_sampling_field_alone_makes_another_key(name: str, data: Any) -> None:
    base = Request("a", (1, 2), SamplingParams(temperature=0))
    if name in OTHER:
        beams = 1 if name == "temperature" else 2
        base = replace(base, sampling=replace(base.sampling, num_beams=beams))
        changed = replace(base.sampling, **{name: OTHER[name]})
    else:
        sampling = replace(base.sampling, num_beams=4)
        value = data.draw(SAMPLING[name].filter(lambda value: value != getattr(sampling, name)))
        base = replace(base, sampling=sampling)
        changed = replace(sampling, **{name: value})
    assert key_of(base, 0) != key_of(replace(base, sampling=changed), 0)


@given(st.lists(st.text("。，\"'\\ (),", min_size=1), max_size=3).map(tuple))
def test_texts_do_not_run_into_each_other(stop: tuple[str, ...]) -> None:
    sampling = SamplingParams(temperature=0, stop=stop)
    joined = SamplingParams(temperature=0, stop=("".join(stop),) if stop else ("x",))
    same = sampling == joined
    assert (
        key_of(Request("a", (1,), sampling), 0) == key_of(Request("a", (1,), joined), 0)
    ) == same


def delta(text: str, reason: str = "", index: int = 0, version: int = 0) -> Delta:
    return Delta(
        request_id="old",
        index=index,
        token_ids=tuple(map(ord, text)),
        text=text,
        finish_reason=reason,
        prompt_tokens=5,
        cached_tokens=1,
        version=version,
        timings=Timings(queue_s=1, first_token_s=2, total_s=3) if reason else None,
    )


WHOLE = (delta("春"), delta("风", index=1), delta("又", "length"), delta("绿", "stop", index=1))


def test_an_answer_comes_back_in_one_piece_an_index() -> None:
    cache = ResultCache(10_000)
    cache.put(b"key", WHOLE, 0)
    found = cache.get(b"key", "new")
    assert [(it.index, it.text, it.finish_reason) for it in found] == [
        (0, "春又", "length"),
        (1, "风绿", "stop"),
    ]
    for it in found:
        assert it.request_id == "new"
        assert it.token_ids == tuple(map(ord, it.text))
        assert it.cached_tokens == it.prompt_tokens == 5, "nothing was computed"
        assert it.timings == Timings()
    assert cache.get(b"other", "new") == ()


@pytest.mark.parametrize(
    "deltas",
    [
        (delta("春"), delta("风", "abort")),
        (delta("春"), delta("风", "deadline")),
        (delta("春"), delta("风")),
        (delta("春", version=1), delta("风", "stop", version=2)),
        (delta("春", "stop"), delta("风", "abort", index=1)),
    ],
)
def test_what_is_no_whole_answer_of_these_weights_is_not_kept(deltas: tuple[Delta, ...]) -> None:
    cache = ResultCache(10_000)
    cache.put(b"key", deltas, 2)
    assert cache.get(b"key", "new") == ()
    assert cache.used_bytes == 0


def test_the_least_recently_used_answers_make_room() -> None:
    one = ResultCache(10**6)
    one.put(b"0", WHOLE, 0)
    cache = ResultCache(3 * one.used_bytes)
    for key in (b"0", b"1", b"2"):
        cache.put(key, WHOLE, 0)
    cache.get(b"0", "")
    cache.put(b"3", WHOLE, 0)
    assert [bool(cache.get(key, "")) for key in (b"0", b"1", b"2", b"3")] == [
        True,
        False,
        True,
        True,
    ]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400)), max_size=60))
def test_memory_is_bounded_and_counted(puts: list[tuple[int, int]]) -> None:
    cache = ResultCache(2000)
    for put in puts:
        cache.put(repr(put).encode(), [delta("长" * put[1], "stop")], 0)
        assert 0 <= cache.used_bytes <= 2000
    kept = {put: cache.get(repr(put).encode(), "") for put in puts}
    assert all(len(found[0].text) == put[1] for put, found in kept.items() if found)
    assert (cache.used_bytes > 0) == any(kept.values())


@pytest.mark.parametrize("results_mb", [-1.0, float("inf"), float("nan")])
def test_a_wrong_size_is_named(results_mb: float) -> None:
    with pytest.raises(ConfigError, match=r"cache.results_mb=.* must be at least 0"):
        CacheConfig(results_mb=results_mb)
