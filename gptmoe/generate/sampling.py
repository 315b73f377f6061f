"""From scores to a token: a pure function of scores, parameters, tokens and (seed, index, place).

The order of `choose`, and how others order the same steps:

    1. logit_bias                    added
    2. repetition_penalty            of tokens in the prompt and the answer
    3. presence, frequency_penalty   of tokens in the answer
    4. temperature                   0: the likeliest token, and nothing below matters
    5. top_k
    6. top_p                         of what top_k left, made to add up to 1
    7. min_p                         against the likeliest token
    8. the inverse of the cumulative distribution at `uniform(seed, index, position)`

transformers 5 has the same order, without step 3. vLLM 0.22 has the same but for min_p, which comes
before top_k and top_p: where min_p and top_p are both given it may keep fewer tokens. OpenAI
describes steps 1 and 3 with these formulas, and no order.

Log-probabilities are the model's own, before step 1, as vLLM's by default.

Letters: B beams, N candidates, T places, V vocabulary.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gptmoe.errors import CheckpointError

from .delta import TokenScore, TopLogprobs
from .params import SamplingParams

NUCLEUS_TRIES = (64, 1024)
"""How many of the likeliest tokens are sorted in search of `top_p`, before all of them are."""

ROWS_AT_ONCE = 64
"""Places of a prompt that are scored together: with 51,200 tokens they take 13 MB."""


def choose(
    logits_V: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    new_ids: Sequence[int],
    index: int = 0,
) -> int:
    """Pick the token behind `prompt_ids` and `new_ids`, for the answer `index` of n.

    A score of -inf is never picked. Raises CheckpointError as `adjusted`.
    """
    scores_V = adjusted(logits_V, params, prompt_ids, new_ids)
    if params.greedy:
        return int(scores_V.cpu().numpy().argmax())  # torch's argmax takes six times as long
    probability_N, token_N = candidates(scores_V, params)
    cumulative_N = probability_N.double().cumsum(0)
    noise = uniform(params.seed, index, len(prompt_ids) + len(new_ids))
    # Noise is at most 1 - 2**-53, so no rounding takes the target up to the total.
    target = noise * float(cumulative_N[-1])
    place = int(torch.searchsorted(cumulative_N, target, right=True))
    return place if token_N is None else int(token_N[place])


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on these alone: 53 bits of a SHA-256.

    `index` counts the answers to one prompt; the first one draws what a single answer does.
    """
    key = struct.pack("<qq", seed, position) + (struct.pack("<q", index) if index else b"")
    digest = hashlib.sha256(key).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53


def adjusted(
    logits_V: Tensor, params: SamplingParams, prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> Tensor:
    """The scores after bias and penalties, in at least float32; `logits_V` is left as it is.

    Raises CheckpointError unless the best score is finite and none is NaN.
    """
    scores_V = _wide(logits_V)
    _check_finite(scores_V.max())
    if params.logit_bias:
        tokens, values = zip(*params.logit_bias, strict=True)
        scores_V = scores_V.index_add(
            0, _ids(tokens, scores_V), scores_V.new_tensor(list(map(float, values)))
        )
    if params.repetition_penalty != 1:
        scores_V = penalize(scores_V, params.repetition_penalty, {*prompt_ids, *new_ids})
    if new_ids and (params.presence_penalty or params.frequency_penalty):
        # OpenAI's formula: score - frequency_penalty * count - presence_penalty * (count > 0)
        token_N, count_N = _ids(new_ids, scores_V).unique(return_counts=True)
        cost_N = params.frequency_penalty * count_N.to(scores_V.dtype) + params.presence_penalty
        scores_V = scores_V.index_add(0, token_N, cost_N, alpha=-1)
    return scores_V


def penalize(scores_V: Tensor, penalty: float, token_ids: Iterable[int]) -> Tensor:
    """Divide positive scores of these tokens, multiply negative ones (1909.05858, 4.1).

    The paper divides all: that would favour a token of negative score, so others do as we do.
    """
    token_N = _ids(sorted(set(token_ids)), scores_V)
    scores_N = scores_V[token_N]
    penalty = max(penalty, 1e-30)  # less would be 0 in float32
    penalized_N = torch.where(scores_N > 0, scores_N / penalty, scores_N * penalty)
    limits = torch.finfo(scores_V.dtype)  # an extreme penalty makes no score infinite
    return scores_V.index_copy(0, token_N, penalized_N.clamp(limits.min, limits.max))


def candidates(scores_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Probabilities (unnormalised) of the tokens that may be drawn, and these tokens.

    Likeliest first where top_k or top_p choose; else all tokens in order, told by None.
    """
    # From the best score down, so that no temperature, however low, divides its way to infinity.
    scores_V = (scores_V - scores_V.max()) / max(params.temperature, 1e-30)
    if not params.top_k and params.top_p == 1:
        probability_V = scores_V.softmax(0)
        if params.min_p:
            least = params.min_p * probability_V.max()
            probability_V = probability_V.where(probability_V >= least, 0)
        return probability_V, None
    if params.top_k:
        top_N, token_N = scores_V.topk(min(params.top_k, len(scores_V)))
        probability_N = top_N.softmax(0)
        kept = _nucleus(probability_N, params.top_p)
    else:
        probability_V = scores_V.softmax(0)
        most = len(scores_V)
        if params.min_p:  # the others need not be sorted
            most = int((probability_V >= params.min_p * probability_V.max()).sum())
        for tries in (*NUCLEUS_TRIES, most):
            probability_N, token_N = probability_V.topk(min(tries, most))
            kept = _nucleus(probability_N, params.top_p)
            if kept < len(token_N) or tries >= most:
                break
    if params.min_p:
        kept = min(kept, int((probability_N >= params.min_p * probability_N[0]).sum()))
    return probability_N[:kept], token_N[:kept]


def _nucleus(probability_N: Tensor, top_p: float) -> int:
    """How many of these it takes to reach `top_p`: at least one, at most all."""
    if top_p == 1:
        return len(probability_N)
    return min(len(probability_N), 1 + int((probability_N.cumsum(0) < top_p).sum()))


def log_probabilities(logits_V: Tensor, token: int, top: int) -> tuple[float, TopLogprobs]:
    """Natural logarithms of the model's probabilities: of `token`, and the `top` largest."""
    logprob_V = log_softmax(logits_V)
    return float(logprob_V[token]), likeliest(logprob_V, top)


def token_scores(
    logits_TV: Tensor, token_ids: Sequence[int], top: int = 0
) -> tuple[TokenScore, ...]:
    """How likely the model holds each of `token_ids` at its place (row), and the `top` likeliest.

    A row's result has the same bits alone and among others. Raises CheckpointError as `adjusted`.
    """
    scores: list[TokenScore] = []
    for start in range(0, len(token_ids), ROWS_AT_ONCE):
        scores_TV = _wide(logits_TV[start : start + ROWS_AT_ONCE])
        best_T = scores_TV.amax(1)
        _check_finite(best_T)
        token_T1 = _ids(token_ids[start : start + ROWS_AT_ONCE], scores_TV)[:, None]
        logprob_TV = scores_TV.log_softmax(1)
        logprobs = logprob_TV.gather(1, token_T1).flatten().tolist()
        greedy = (scores_TV.gather(1, token_T1) >= best_T[:, None]).flatten().tolist()
        likeliest_T = [likeliest(logprob_V, top) for logprob_V in logprob_TV]
        scores += map(TokenScore, logprobs, greedy, likeliest_T)
    return tuple(scores)


def log_softmax(logits_V: Tensor) -> Tensor:
    """The model's log-probabilities, in at least float32."""
    return _wide(logits_V).log_softmax(0)


def likeliest(scores_V: Tensor, count: int) -> TopLogprobs:
    """The `count` tokens of the best scores with these, best first; of equals, lower tokens."""
    if count == 0:
        return ()
    # topk alone may pick any of several equal scores at the border.
    least = scores_V.topk(min(count, len(scores_V))).values[-1]
    token_N = (scores_V >= least).nonzero().flatten()
    score_N, order_N = scores_V[token_N].sort(descending=True, stable=True)
    return tuple(zip(token_N[order_N][:count].tolist(), score_N[:count].tolist(), strict=True))


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _ids(token_ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=like.device)


def _check_finite(best: Tensor) -> None:
    """Whether the best of each row is finite; a NaN anywhere in a row is its best."""
    wrong = [found for found in best.flatten().tolist() if not math.isfinite(found)]
    if wrong:
        raise CheckpointError(
            f"the model's best score of the next token must be finite; found {wrong[0]}: its "
            "weights are damaged, or overflow in this dtype; verify the checkpoint, or load it in "
            "float32"
        )
