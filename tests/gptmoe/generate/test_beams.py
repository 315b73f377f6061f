"""Beam search against plain lists, and against every sequence there is."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptmoe.errors import CheckpointError
from gptmoe.generate.beams import Step
from gptmoe.generate.params import SamplingParams
from tests.gptmoe.generate.beam_reference import (
    Ids,
    Search,
    every_answer,
    naive,
    random_model,
    rows,
    run,
    start,
)
from tests.gptmoe.generate.reference import softmax


def params(**given: Any) -> SamplingParams:
    return SamplingParams(temperature=0, **given)


PENALTIES = [-2.0, -0.3, 0.0, 0.7, 1.0, 3.0]


@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize(("vocab_size", "max_new_tokens"), [(3, 4), (4, 3), (2, 6)])
def test_with_enough_beams_nothing_better_exists(
    vocab_size: int, max_new_tokens: int, length_penalty: float
) -> None:
    """16 beams hold every unfinished answer of these sizes."""
    for seed in range(6):
        model = random_model(seed, vocab_size)
        asked = params(num_beams=16, length_penalty=length_penalty)
        search = Search(model, asked, frozenset({vocab_size - 1}), max_new_tokens)
        wanted = every_answer(search, vocab_size)[:16]
        found = run(search).best(16)
        assert [it.token_ids for it in found] == wanted
        assert [it.score for it in found] == pytest.approx([search.score(ids) for ids in wanted])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    beams=st.integers(2, 5),
    length_penalty=st.sampled_from(PENALTIES),
    end_ids=st.frozensets(st.integers(0, 4), max_size=2),
    max_new_tokens=st.integers(1, 5),
    stop=st.lists(st.text("abcde", min_size=1, max_size=2), max_size=1).map(tuple),
    more=st.fixed_dictionaries(
        {},
        optional={
            "logit_bias": st.just(((2, 1.5), (4, -1.0))),
            "repetition_penalty": st.just(1.6),
            "presence_penalty": st.just(0.7),
            "frequency_penalty": st.just(0.4),
        },
    ),
)
def test_as_a_search_that_sorts_everything_and_never_stops_early(
    seed: int,
    beams: int,
    length_penalty: float,
    end_ids: frozenset[int],
    max_new_tokens: int,
    stop: tuple[str, ...],
    more: dict[str, Any],
) -> None:
    asked = params(num_beams=beams, length_penalty=length_penalty, stop=stop, **more)
    search = Search(random_model(seed, 5), asked, end_ids, max_new_tokens, prompt_ids=(1, 3))
    found = run(search).best(beams)
    wanted = naive(search, stops_early=False)
    assert [it.token_ids for it in found] == wanted
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(search.score(hypothesis.token_ids))
        assert hypothesis.finish_reason == search.reason(hypothesis.token_ids)
        own = [
            math.log(softmax(search.model(hypothesis.token_ids[:at]))[token])
            for at, token in enumerate(hypothesis.token_ids)
        ]
        assert hypothesis.logprobs == pytest.approx(own)
        assert hypothesis.cumulative_logprob == pytest.approx(sum(own))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.sampled_from([(2, 2), (4, 2), (6, 3), (3, 3)]),
    diversity_penalty=st.sampled_from([0.0, 0.5, 3.0, 1e6]),
    length_penalty=st.sampled_from(PENALTIES),
    end_ids=st.frozensets(st.integers(0, 5), max_size=2),
    max_new_tokens=st.integers(1, 4),
)
def test_groups_as_a_search_that_sorts_everything(
    seed: int,
    sizes: tuple[int, int],
    diversity_penalty: float,
    length_penalty: float,
    end_ids: frozenset[int],
    max_new_tokens: int,
) -> None:
    """A group that has stopped takes no tokens, so the reference stops, too: by trying lengths."""
    beams, groups = sizes
    asked = params(
        num_beams=beams,
        num_beam_groups=groups,
        diversity_penalty=diversity_penalty,
        length_penalty=length_penalty,
    )
    search = Search(random_model(seed, 6), asked, end_ids, max_new_tokens)
    wanted = naive(search, stops_early=True)
    found = run(search).best(beams)
    assert [it.token_ids for it in found] == wanted
    assert [it.score for it in found] == pytest.approx([search.score(ids) for ids in wanted])


@pytest.mark.parametrize(
    ("length_penalty", "steps"), [(-1.0, 1), (0.0, 1), (0.15, 1), (0.16, 100), (1.0, 100)]
)
def test_a_search_stops_as_soon_as_nothing_better_can_come(
    length_penalty: float, steps: int
) -> None:
    """Two ends of -1 and -2, and a way that costs 4 at first and then nothing, for 100 tokens.

    It beats the worse end if 4 / 100 ** length_penalty < 2, which is so from 0.1505 on.
    """
    first = [-1.0, -2.0, -4.0]
    first += [math.log((1 - sum(map(math.exp, first))) / 64)] * 64  # each costs more than 4
    certain = [-60.0, -60.0, 0.0] + [-60.0] * 64
    asked = params(num_beams=2, length_penalty=length_penalty)
    search = Search(lambda ids: certain if ids else first, asked, frozenset({0, 1}), 100)
    assert run(search).length == steps


def test_the_penalty_ranks_and_is_not_reported() -> None:
    """Two groups of one: the second gives way, and reports what the model says of its choice."""
    logprobs = [math.log(part) for part in (0.5, 0.3, 0.2)]
    asked = params(num_beams=2, num_beam_groups=2, diversity_penalty=2.0, n=2)
    best = run(Search(lambda _: logprobs, asked, frozenset(), 1)).best(2)
    assert [it.token_ids for it in best] == [(0,), (1,)]
    assert [it.cumulative_logprob for it in best] == pytest.approx(logprobs[:2])
    assert [it.score for it in best] == pytest.approx(logprobs[:2])


def test_without_a_penalty_groups_are_copies() -> None:
    asked = params(num_beams=4, num_beam_groups=2)
    search = Search(random_model(3, 6), asked, frozenset({5}), 4)
    best = run(search).best(4)
    assert best[0].token_ids == best[1].token_ids
    assert best[2].token_ids == best[3].token_ids
    assert best[0].token_ids != best[2].token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_and_groups_at_the_top_of_a_large_vocabulary(dtype: torch.dtype) -> None:
    """All 18 end tokens are the likeliest, and groups push each other aside: still G live on."""
    end_ids, size = frozenset(range(0, 36, 2)), 300
    asked = params(num_beams=8, num_beam_groups=4, diversity_penalty=50.0)
    model = random_model(7, size, sharpness=0.3)

    def peaked(token_ids: Ids) -> list[float]:
        scores = torch.tensor(model(token_ids))
        scores[sorted(end_ids)] += 3.0
        return scores.tolist()  # type: ignore[no-any-return]

    search = Search(peaked, asked, end_ids, 3)
    beams = start(search)
    step = beams.advance(rows(peaked, [()]).to(dtype))
    assert len(step.tokens) == len(set(step.tokens)) == 8
    assert end_ids.isdisjoint(step.tokens)
    by_rank = [t for t in sorted(range(size), key=lambda t: -peaked(())[t]) if t not in end_ids]
    assert sorted(step.tokens) == sorted(by_rank[:8])


def test_of_equals_the_lower_parent_and_token_go_first() -> None:
    search = Search(lambda _: [0.0] * 50, params(num_beams=3, n=3), frozenset(), 3)
    beams = start(search)
    assert beams.living == ((),)
    equal = torch.zeros(1, 50)
    assert beams.advance(equal) == Step(parents=(0, 0, 0), tokens=(0, 1, 2), done=False)
    assert beams.advance(equal.expand(3, 50)).tokens == (0, 1, 2)
    assert beams.living == ((0, 0), (0, 1), (0, 2))
    assert beams.advance(equal.expand(3, 50)) == Step(parents=(), tokens=(), done=True)
    assert [it.token_ids for it in beams.best(3)] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]


def test_tokens_of_no_probability_leave_fewer_beams() -> None:
    scores = [0.0, -math.inf, 1.0, -math.inf]
    search = Search(lambda _: scores, params(num_beams=4), frozenset({2}), 2)
    beams = start(search)
    step = beams.advance(rows(search.model, [()]))
    assert step == Step(parents=(0,), tokens=(0,), done=False)
    assert beams.advance(rows(search.model, [(0,)])).done
    assert {it.token_ids for it in beams.best(4)} == {(2,), (0, 2), (0, 0)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    beams = start(Search(random_model(0, 3), params(num_beams=2), frozenset(), 2))
    with pytest.raises(CheckpointError, match=f"found {bad}"):
        beams.advance(torch.tensor([[0.0, bad, 1.0]]))


def test_another_number_of_rows_is_a_bug() -> None:
    beams = start(Search(random_model(0, 3), params(num_beams=2), frozenset(), 2))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        beams.advance(torch.zeros(2, 3))


def test_the_text_ends_before_what_stopped_it() -> None:
    """An end token's name and a stop string are no text; what was held back is."""
    forced = {(): 0, (0,): 1, (0, 1): 2, (0, 1, 2): 3}  # a b c d, then anything

    def model(token_ids: Ids) -> list[float]:
        wanted = forced.get(token_ids, 5)
        return [10.0 if token == wanted else 0.0 for token in range(6)]

    def text(*, end_ids: frozenset[int], stop: tuple[str, ...] = (), most: int = 9) -> str:
        search = Search(model, params(num_beams=2, stop=stop), end_ids, most)
        best = run(search).best(1)[0]
        assert best.finish_reason == ("length" if most < 9 else "stop")
        return best.text

    assert text(end_ids=frozenset({3})) == "abc"
    assert text(end_ids=frozenset({5}), stop=("cd",)) == "ab"
    assert text(end_ids=frozenset({3}), stop=("cde",)) == "abc"
    assert text(end_ids=frozenset(), stop=("cde",), most=3) == "abc"


def test_a_search_that_is_cut_short_has_what_it_found() -> None:
    search = Search(random_model(5, 6), params(num_beams=3, n=3), frozenset({4}), 8)
    beams = start(search)
    assert [it.token_ids for it in beams.best(3, reason="deadline")] == [()]
    beams.advance(rows(search.model, beams.living))
    beams.advance(rows(search.model, beams.living))
    finished = beams.best(3)
    unfinished = beams.best(9, reason="abort")
    assert {it.token_ids for it in unfinished} == {*beams.living} | {
        it.token_ids for it in finished
    }
    assert {it.finish_reason for it in unfinished if it.token_ids in beams.living} == {"abort"}
    for hypothesis in unfinished:
        assert hypothesis.score == pytest.approx(search.score(hypothesis.token_ids))
    assert list(unfinished) == sorted(unfinished, key=lambda it: -it.score)
    beams.advance(rows(search.model, beams.living))  # asking has changed nothing
    assert all(len(ids) == 3 for ids in beams.living)


def test_asking_for_an_unfinished_text_changes_nothing() -> None:
    """It ends with what was held back; the search goes on to the stop string."""
    scores = [[10.0 if token == wanted else 0.0 for token in range(5)] for wanted in range(5)]
    search = Search(lambda ids: scores[len(ids)], params(num_beams=2, stop=("cd",)), frozenset(), 4)
    beams = start(search)
    for _ in range(3):
        beams.advance(rows(search.model, beams.living))
    assert beams.best(1, reason="abort")[0].text == "abc"
    beams.advance(rows(search.model, beams.living))
    assert beams.best(1)[0].text == "ab"
    assert beams.best(1)[0].finish_reason == "stop"


def test_the_likeliest_tokens_are_those_of_each_place() -> None:
    search = Search(random_model(9, 6), params(num_beams=3, top_logprobs=2), frozenset({5}), 4)
    for hypothesis in run(search).best(3):
        for at, top in enumerate(hypothesis.top_logprobs):
            parts = softmax(search.model(hypothesis.token_ids[:at]))
            ranked = sorted(range(6), key=lambda token: -parts[token])[:2]
            assert [token for token, _ in top] == ranked
            assert [value for _, value in top] == pytest.approx(
                [math.log(parts[t]) for t in ranked]
            )
        assert len(hypothesis.top_logprobs) == len(hypothesis.token_ids)
