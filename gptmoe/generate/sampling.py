"""From scores to a token: a pure function of scores, parameters, history and (seed, position).

Letters: V vocabulary, N candidates.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .request import SamplingParams


def choose(logits_V: Tensor, params: SamplingParams, history: Sequence[int]) -> int:
    """Pick the next token after `history` (prompt and generated tokens).

    Order: repetition penalty, temperature, top_k, top_p, then the inverse of the cumulative
    distribution at one uniform number that depends on (seed, position) only.
    """
    scores_V = logits_V.float()
    if params.repetition_penalty != 1:
        scores_V = penalize(scores_V, params.repetition_penalty, history)
    if params.greedy:
        return int(scores_V.argmax())
    probability_N, token_N = candidates(scores_V, params)
    cumulative_N = probability_N.double().cumsum(0)
    target = uniform(params.seed, len(history)) * cumulative_N[-1]
    index = int(torch.searchsorted(cumulative_N, target, right=True))
    return int(token_N[min(index, len(token_N) - 1)])


def log_probability(logits_V: Tensor, token: int) -> float:
    """Natural logarithm of the model's probability of `token`, before penalty and temperature."""
    return float(logits_V.float().log_softmax(0)[token])


def candidates(scores_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities (unnormalised), likeliest first."""
    k = min(params.top_k, len(scores_V)) or len(scores_V)
    top_N, token_N = torch.topk(scores_V / params.temperature, k)
    probability_N = top_N.softmax(0)
    if params.top_p < 1:
        before_N = probability_N.cumsum(0) - probability_N
        kept = max(1, int((before_N < params.top_p).sum()))
        return probability_N[:kept], token_N[:kept]
    return probability_N, token_N


def penalize(scores_V: Tensor, penalty: float, history: Sequence[int]) -> Tensor:
    """Divide positive scores of the tokens present, multiply negative ones (1909.05858, 4.1)."""
    present = torch.tensor(sorted(set(history)), device=scores_V.device)
    scores = scores_V[present]
    return scores_V.index_copy(
        0, present, torch.where(scores > 0, scores / penalty, scores * penalty)
    )


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of (seed, position): 53 bits of a SHA-256."""
    digest = hashlib.sha256(struct.pack("<qq", seed, position)).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53
