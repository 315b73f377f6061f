"""Sampling against plain loops in Python's floats."""

import math
from collections import Counter

import pytest
import torch

from gptmoe.generate.params import SamplingParams
from gptmoe.generate.sampling import candidates, choose, log_probability, penalize, uniform

SCORES = [2.0, -1.0, 0.5, 3.0, 1.0, -4.0, 2.5, 0.0]


def reference(scores: list[float], params: SamplingParams, history: list[int]) -> dict[int, float]:
    """The distribution that the parameters ask for, by token."""
    if params.repetition_penalty != 1:
        for token in set(history):
            score, penalty = scores[token], params.repetition_penalty
            scores = [
                *scores[:token],
                score / penalty if score > 0 else score * penalty,
                *scores[token + 1 :],
            ]
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])
    ranked = ranked[: params.top_k or len(scores)]
    weights = {token: math.exp(scores[token] / params.temperature) for token in ranked}
    total, before, kept = sum(weights.values()), 0.0, {}
    for token in ranked:
        if before < params.top_p or not kept:
            kept[token] = weights[token] / total
        before += weights[token] / total
    return {token: value / sum(kept.values()) for token, value in kept.items()}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0, top_k=3),
        SamplingParams(top_p=0.7),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_k=5, top_p=0.8, temperature=1.5, repetition_penalty=1.8),
        SamplingParams(top_k=100),
    ],
    ids=str,
)
def test_the_drawn_tokens_follow_the_distribution(params: SamplingParams) -> None:
    history, draws = [3, 3, 5], 4000
    expected = reference(SCORES, params, history)
    scores = torch.tensor(SCORES)
    counts: Counter[int] = Counter()
    for seed in range(draws):
        seeded = SamplingParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            repetition_penalty=params.repetition_penalty,
            seed=seed,
        )
        counts[choose(scores, seeded, history)] += 1
    assert set(counts) <= set(expected)
    chi_square = sum(
        (counts[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items() if draws * p > 5
    )
    assert chi_square < 35  # 7 degrees of freedom: one in 10,000 beyond 30


def test_greedy_takes_the_first_of_the_best() -> None:
    assert choose(torch.tensor([1.0, 5.0, 5.0]), SamplingParams(temperature=0), [0]) == 1


def test_candidates_come_likeliest_first() -> None:
    probability_N, token_N = candidates(torch.tensor(SCORES), SamplingParams(top_k=3))
    assert token_N is not None
    assert token_N.tolist() == [3, 6, 0]
    weights = [math.exp(3.0), math.exp(2.5), math.exp(2.0)]
    assert probability_N.tolist() == pytest.approx([w / sum(weights) for w in weights])


def test_all_tokens_may_be_drawn_in_order_where_nothing_is_cut_off() -> None:
    probability_V, token_N = candidates(torch.tensor(SCORES), SamplingParams(temperature=0.7))
    assert token_N is None
    weights = [math.exp(score / 0.7) for score in SCORES]
    assert probability_V.tolist() == pytest.approx([w / sum(weights) for w in weights])


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
        assert choose(torch.tensor(SCORES) * 1e4, params, [0]) == SCORES.index(max(SCORES))


def test_a_token_of_no_probability_is_never_drawn() -> None:
    scores = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    drawn = {choose(scores, SamplingParams(seed=seed), [0]) for seed in range(200)}
    assert drawn == {1, 3}


def test_the_penalty_touches_only_what_was_seen() -> None:
    penalized = penalize(torch.tensor(SCORES), 2.0, [0, 1, 0])
    assert penalized.tolist() == [1.0, -2.0, *SCORES[2:]]


def test_the_noise_is_a_function_of_seed_and_position() -> None:
    numbers = [uniform(seed, position) for seed in range(-20, 20) for position in range(50)]
    assert numbers == [uniform(seed, position) for seed in range(-20, 20) for position in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.03)


def test_log_probability_is_the_models_own() -> None:
    total = sum(math.exp(score) for score in SCORES)
    assert log_probability(torch.tensor(SCORES), 4) == pytest.approx(
        math.log(math.exp(1.0) / total)
    )
