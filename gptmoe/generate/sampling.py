"""From scores to a token: a pure function of scores, parameters, history and (seed, position).

Letters: V vocabulary, N candidates.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from gptmoe.text import Tokenizer

from .delta import TokenScore, TopLogprobs
from .params import SamplingParams

NUCLEUS_TRIES = (64, 1024)
"""How many of the likeliest tokens are sorted in search of `top_p`, before all of them are."""


def choose(
    logits_V: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    new_ids: Sequence[int],
    index: int = 0,
) -> int:
    """Pick the next token after `history` (prompt and generated tokens).

    Order: repetition penalty, temperature, top_k, top_p, then the inverse of the cumulative
    distribution at one uniform number that depends on (seed, position) only.
    """
    history = [*prompt_ids, *new_ids]
    scores_V = logits_V.float()
    if params.repetition_penalty != 1:
        scores_V = penalize(scores_V, params.repetition_penalty, history)
    if params.greedy:
        return int(scores_V.cpu().numpy().argmax())  # torch's argmax takes six times as long
    probability_N, token_N = candidates(scores_V, params)
    cumulative_N = probability_N.double().cumsum(0)
    target = uniform(params.seed, len(history)) * cumulative_N[-1]
    index = int(torch.searchsorted(cumulative_N, target, right=True))
    index = min(index, len(cumulative_N) - 1)
    return index if token_N is None else int(token_N[index])


def log_probability(logits_V: Tensor, token: int) -> float:
    """Natural logarithm of the model's probability of `token`, before penalty and temperature."""
    return float(logits_V.float().log_softmax(0)[token])


def candidates(scores_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Probabilities (unnormalised) of the tokens that may be drawn, and these tokens.

    Likeliest first where top_k or top_p choose; else all tokens in order, told by None.
    """
    # From the best score down, so that no temperature, however low, divides its way to infinity.
    scores_V = (scores_V - scores_V.max()) / max(params.temperature, 1e-30)
    if params.top_k:
        top_N, token_N = scores_V.topk(min(params.top_k, len(scores_V)))
        probability_N = top_N.softmax(0)
        kept = _nucleus(probability_N, params.top_p)
        return probability_N[:kept], token_N[:kept]
    probability_V = scores_V.softmax(0)
    if params.top_p == 1:
        return probability_V, None
    for tries in (*NUCLEUS_TRIES, len(scores_V)):
        probability_N, token_N = probability_V.topk(min(tries, len(scores_V)))
        kept = _nucleus(probability_N, params.top_p)
        if kept < len(token_N):
            break
    return probability_N[:kept], token_N[:kept]


def _nucleus(probability_N: Tensor, top_p: float) -> int:
    """How many of these it takes to reach `top_p`: at least one, at most all."""
    if top_p == 1:
        return len(probability_N)
    return min(len(probability_N), 1 + int((probability_N.cumsum(0) < top_p).sum()))


def penalize(scores_V: Tensor, penalty: float, history: Sequence[int]) -> Tensor:
    """Divide positive scores of the tokens present, multiply negative ones (1909.05858, 4.1)."""
    present_N = torch.tensor(sorted(set(history)), device=scores_V.device)
    scores_N = scores_V[present_N]
    penalized_N = torch.where(scores_N > 0, scores_N / penalty, scores_N * penalty)
    return scores_V.index_copy(0, present_N, penalized_N)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of (seed, position): 53 bits of a SHA-256."""
    digest = hashlib.sha256(struct.pack("<qq", seed, position)).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53


def ends(token: int, params: SamplingParams, tokenizer: Tokenizer) -> bool:
    """shim"""
    special = not params.ignore_end and token in (tokenizer.end_id, tokenizer.sep_id)
    return special or token in params.stop_token_ids


def log_probabilities(logits_V: Tensor, token: int, top: int) -> tuple[float, TopLogprobs]:
    """shim"""
    return log_probability(logits_V, token), ()


def token_scores(logits_TV: Tensor, token_ids: Sequence[int]) -> tuple[TokenScore, ...]:
    """shim"""
    return tuple(
        TokenScore(log_probability(row, token), int(row.argmax()) == token)
        for row, token in zip(logits_TV, token_ids, strict=True)
    )
