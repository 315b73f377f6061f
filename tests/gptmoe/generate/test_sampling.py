"""Choosing a token, against a reference in plain loops and Python's floats."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from gptmoe.errors import CheckpointError
from gptmoe.generate import sampling
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.sampling import adjusted, candidates, choose, penalize
from tests.gptmoe.generate.reference import (
    TooCloseError,
    changed,
    distribution,
    reference_choice,
    softmax,
)

SCORES = [2.0, -1.0, 0.5, 3.0, 1.0, -4.0, 2.5, 0.0]
SIZE = 12
TOKEN = st.integers(0, SIZE - 1)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.5, 100.0]),
    "top_k": st.sampled_from([0, 1, 2, 5, SIZE, 1000]),
    "top_p": st.sampled_from([1e-9, 0.3, 0.8, 0.99, 1.0]),
    "min_p": st.sampled_from([0.0, 1e-4, 0.1, 0.6, 1.0]),
    "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 100.0]),
    "presence_penalty": st.sampled_from([-1.5, 0.0, 0.4, 2.0]),
    "frequency_penalty": st.sampled_from([-0.5, 0.0, 0.3, 2.0]),
    "logit_bias": st.dictionaries(
        TOKEN, st.sampled_from([-100.0, -1.0, 0.5, 100.0]), max_size=3
    ).map(lambda given: tuple(given.items())),
    "seed": st.integers(-(2**63), 2**63 - 1),
}


@settings(max_examples=250)
@given(
    scores=st.lists(st.floats(-8, 8), min_size=SIZE, max_size=SIZE),
    asked=st.fixed_dictionaries({}, optional=SETTINGS),
    prompt=st.lists(TOKEN, min_size=1, max_size=4),
    new=st.lists(TOKEN, max_size=6),
    index=st.integers(0, 15),
)
def test_every_parameter_as_the_reference(
    scores: list[float], asked: dict[str, Any], prompt: list[int], new: list[int], index: int
) -> None:
    params = SamplingParams(**asked)
    try:
        wanted = reference_choice(scores, params, prompt, new, index)
    except TooCloseError:
        reject()
    logits_V = torch.tensor(scores, dtype=torch.float64)
    assert choose(logits_V, params, prompt, new, index) == wanted
    assert logits_V.tolist() == scores  # left as it was


SETTINGS_OF_ALL_KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "min_p": 0.02},
    {"top_k": 30},
    {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"repetition_penalty": 1.4, "logit_bias": ((3, 5.0), (2900, -100.0))},
]


@pytest.mark.parametrize("asked", SETTINGS_OF_ALL_KINDS, ids=str)
def test_scores_of_every_width_choose_alike(asked: dict[str, Any]) -> None:
    """float32's sums move the borders of the draw by some 1e-6; narrower scores are widened."""
    prompt, new = [5, 17, 2999], [3, 3, 2900, 800]
    for seed in range(40):
        params, scores_V = SamplingParams(seed=seed, **asked), spread(seed)
        chosen = choose(scores_V, params, prompt, new)
        assert chosen == choose(scores_V.double(), params, prompt, new)
        for dtype in (torch.bfloat16, torch.float16):
            narrow_V = scores_V.to(dtype)
            chosen = choose(narrow_V, params, prompt, new)
            assert chosen == choose(narrow_V.float(), params, prompt, new)


def spread(place: int) -> Tensor:
    """3,000 scores that float32 holds exactly, by arithmetic alone."""
    residues = [(t * t * 7919 + t * 104729 + place * 15485863) % 9973 for t in range(3000)]
    return torch.tensor([residue / 1024 for residue in residues])


PINNED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "plain": ({}, [1063, 1670, 2100, 1584, 1305, 853, 2746, 2083]),
    "cool": ({"temperature": 0.5}, [1066, 1648, 2027, 1623, 1282, 846, 2754, 2062]),
    "top_k": (
        {"top_k": 40, "temperature": 1.3},
        [309, 1107, 1891, 173, 1708, 2853, 2746, 2794],
    ),
    "top_p": ({"top_p": 0.9}, [1646, 1135, 2069, 319, 2688, 2663, 2289, 1124]),
    "all": (
        {"top_k": 300, "top_p": 0.8, "temperature": 1.7, "repetition_penalty": 1.8},
        [2472, 572, 27, 1299, 2308, 2269, 2862, 2777],
    ),
    "greedy": (
        {"temperature": 0, "repetition_penalty": 1.3},
        [2463, 2860, 840, 2827, 833, 2694, 1530, 2547],
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_a_seed_says_the_same_in_every_version(name: str) -> None:
    """The text of a seed is a promise to whoever stored the seed."""
    asked, wanted = PINNED[name]
    prompt, new = [5, 17, 2999], list[int]()
    for place in range(len(wanted)):
        new.append(choose(spread(place), SamplingParams(seed=-7, **asked), prompt, new))
    assert new == wanted


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2, "logit_bias": ((5, 6.0),)},
        {"top_k": 5, "top_p": 0.8, "temperature": 1.5, "repetition_penalty": 1.8},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_the_drawn_tokens_follow_the_distribution(asked: dict[str, Any]) -> None:
    prompt, new, draws = [3, 4], [3, 5, 5], 3000
    scores_V = torch.tensor(SCORES)
    params = SamplingParams(**asked)
    expected = distribution(changed(SCORES, params, prompt, new), params)
    counts = Counter(
        choose(scores_V, SamplingParams(seed=seed, **asked), prompt, new) for seed in range(draws)
    )
    assert set(counts) <= set(expected)
    chi_square = sum(
        (counts[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items() if draws * p > 5
    )
    assert chi_square < 35  # 7 degrees of freedom: one in 10,000 beyond 30


def test_greedy_takes_the_first_of_the_best() -> None:
    assert choose(torch.tensor([1.0, 5.0, 5.0]), SamplingParams(temperature=0), [0], []) == 1


def test_candidates_come_likeliest_first() -> None:
    probability_N, token_N = candidates(torch.tensor(SCORES), SamplingParams(top_k=3))
    assert token_N is not None
    assert token_N.tolist() == [3, 6, 0]
    weights = [math.exp(3.0), math.exp(2.5), math.exp(2.0)]
    assert probability_N.tolist() == pytest.approx([w / sum(weights) for w in weights])


def test_all_tokens_may_be_drawn_in_order_where_nothing_is_cut_off() -> None:
    probability_V, token_N = candidates(torch.tensor(SCORES), SamplingParams(temperature=0.7))
    assert token_N is None
    assert probability_V.tolist() == pytest.approx(softmax([score / 0.7 for score in SCORES]))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.99999])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_nucleus_of_a_large_vocabulary(top_p: float, temperature: float) -> None:
    """However many tokens it takes, they are those of a full sort."""
    generator = torch.Generator().manual_seed(0)
    scores_V = torch.randn(5000, generator=generator, dtype=torch.float64) * 3
    probability_V = (scores_V / temperature).softmax(0)
    sorted_V, order_V = probability_V.sort(descending=True)
    wanted = int((sorted_V.cumsum(0) < top_p).sum()) + 1
    params = SamplingParams(top_p=top_p, temperature=temperature)
    probability_N, token_N = candidates(scores_V.float(), params)
    assert token_N is not None
    assert abs(len(token_N) - wanted) <= wanted // 1000  # sums of float32
    assert token_N.tolist() == order_V[: len(token_N)].tolist()
    assert probability_N.double().tolist() == pytest.approx(
        sorted_V[: len(token_N)].tolist(), rel=1e-4
    )


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-3])
def test_a_low_temperature_is_nearly_greedy(temperature: float) -> None:
    for top_k in (0, 3):
        params = SamplingParams(temperature=temperature, top_k=top_k)
        assert choose(torch.tensor(SCORES) * 1e4, params, [0], []) == SCORES.index(max(SCORES))


@pytest.mark.parametrize("asked", [{}, {"top_k": 4}, {"top_p": 0.999}, {"min_p": 1e-9}])
def test_a_token_of_no_probability_is_never_drawn(asked: dict[str, Any]) -> None:
    scores = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    drawn = {choose(scores, SamplingParams(seed=s, **asked), [0], [4]) for s in range(200)}
    assert drawn == {1, 3}


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-53])
def test_the_ends_of_the_noise_draw_possible_tokens(
    noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda *place: noise)
    for seed in range(100):
        scores_V = spread(seed)[:999]
        scores_V[[0, 1, 997, 998]] = -math.inf
        wanted = 2 if noise == 0 else 996
        assert choose(scores_V, SamplingParams(), [0], []) == wanted
        ranked = scores_V.sort(descending=True, stable=True).indices[:7]
        token = choose(scores_V, SamplingParams(top_k=7), [0], [])
        assert scores_V[token] == scores_V[ranked[0 if noise == 0 else 6]]


def test_the_penalty_touches_only_what_was_seen() -> None:
    penalized = penalize(torch.tensor(SCORES), 2.0, [0, 1, 0])
    assert penalized.tolist() == [1.0, -2.0, *SCORES[2:]]


@pytest.mark.parametrize("penalty", [math.ulp(0.0), 1e-300, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_extreme_penalty_stays_finite(penalty: float, dtype: torch.dtype) -> None:
    scores_V = torch.tensor([-3e38, -1.0, 0.0, 1.0, 3e38, -math.inf], dtype=dtype)
    params = SamplingParams(repetition_penalty=penalty)
    assert adjusted(scores_V, params, range(6), []).isfinite().all()
    assert choose(scores_V, params, range(6), []) in range(5)


BAD = [math.nan, math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("asked", [{}, {"temperature": 0}, {"top_k": 2}, {"min_p": 0.5}])
def test_scores_that_are_not_finite_are_refused(bad: float, asked: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        choose(torch.tensor([1.0, bad, 2.0]), SamplingParams(**asked), [0, 1], [])
    assert str(caught.value) == (
        f"the model's best score of the next token must be finite; found {bad}: its weights are "
        "damaged, or overflow in this dtype; verify the checkpoint, or load it in float32"
    )


def test_a_place_without_any_possible_token_is_refused() -> None:
    with pytest.raises(CheckpointError, match="found -inf"):
        choose(torch.full((4,), -math.inf), SamplingParams(), [0], [])


def test_answers_to_one_prompt_differ_and_repeat() -> None:
    """n answers: the first is what a single one would be, each has noise of its own."""
    params = SamplingParams(seed=5)

    def answer(index: int) -> list[int]:
        new: list[int] = []
        for place in range(8):
            new.append(choose(spread(place), params, [1], new, index))
        return new

    answers = [answer(index) for index in range(8)]
    assert len(set(map(tuple, answers))) == 8
    assert answers == [answer(index) for index in range(8)]
