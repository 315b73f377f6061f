"""What the sampling parameters say, in plain loops, full sorts and Python's floats (float64)."""

import math
from collections.abc import Sequence
from itertools import pairwise

from gptmoe.generate.params import SamplingParams
from gptmoe.generate.sampling import uniform

CLOSE = 1e-9
"""Nearer than this to a border, whoever sums in another order may decide otherwise."""


class TooCloseError(Exception):
    """The example lies on a border."""


def _far(good: bool) -> None:
    if not good:
        raise TooCloseError


def changed(
    scores: Sequence[float], params: SamplingParams, prompt: list[int], new: list[int]
) -> list[float]:
    """Bias and penalties, token by token."""
    scores = list(scores)
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in range(len(scores)):
        if token in prompt or token in new:
            if scores[token] > 0:
                scores[token] /= params.repetition_penalty
            else:
                scores[token] *= params.repetition_penalty
        count = new.count(token)
        scores[token] -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
    return scores


def softmax(scores: Sequence[float]) -> list[float]:
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def distribution(scores: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """What may be drawn, in the order of the draw, with probabilities that add up to 1."""
    best = max(scores)
    scores = [(score - best) / params.temperature for score in scores]
    ranked = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    ranked = ranked[: params.top_k or len(ranked)]
    probability = dict(zip(ranked, softmax([scores[token] for token in ranked]), strict=True))
    kept, before = [], 0.0
    for token in ranked:
        _far(params.top_p == 1 or abs(before - params.top_p) > CLOSE)
        if before < params.top_p or not kept or params.top_p == 1:
            kept.append(token)
        before += probability[token]
    least = params.min_p * probability[kept[0]]
    _far(not params.min_p or all(abs(probability[t] - least) > CLOSE * least for t in kept[1:]))
    kept = [token for token in kept if probability[token] >= least]
    if not params.top_k and params.top_p == 1:
        kept.sort()
    total = math.fsum(probability[token] for token in kept)
    return {token: probability[token] / total for token in kept}


def draw(probability: dict[int, float], noise: float) -> int:
    total = 0.0
    for token, part in probability.items():
        total += part
        _far(abs(total - noise) > CLOSE)
        if noise < total:
            return token
    raise AssertionError("the noise is below 1")


def reference_choice(
    scores: Sequence[float], params: SamplingParams, prompt: list[int], new: list[int], index: int
) -> int:
    scores = changed(scores, params, prompt, new)
    if params.temperature == 0:
        return scores.index(max(scores))
    cut = params.top_k or params.top_p < 1
    in_order = sorted(scores)
    # Which of two equals goes first at a cut is not said.
    _far(not cut or all(b - a > CLOSE for a, b in pairwise(in_order)))
    noise = uniform(params.seed, index, len(prompt) + len(new))
    return draw(distribution(scores, params), noise)
