"""What an engine says of a request, step by step. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from gptmoe.errors import GptMoeError

TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place with their log-probabilities, likeliest first."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from a request's arrival at the engine."""

    queue_s: float = 0.0
    """To its first step."""
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How likely the model holds a token that was given, at its place."""

    logprob: float
    greedy: bool
    """Whether no token is likelier."""
    likeliest: TopLogprobs = ()
    """At its place, where the request asks for top_logprobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new for one answer of a request after a step."""

    request_id: str
    index: int = 0
    """Which of its n answers."""
    token_ids: tuple[int, ...] = ()
    text: str = ""
    """New text: whole characters, certain not to be part of a stop string."""
    finish_reason: str = ""
    """"" while running; then "stop" (end token, stop token or stop string), "length", "abort",
    "deadline" or "error"."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt: found in the cache."""
    logprobs: tuple[float, ...] = ()
    """Of each token, where the request asks for them."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """At each token's place, where the request asks for them."""
    prompt_scores: tuple[TokenScore, ...] = ()
    """Of the prompt's tokens from Request.score_from on, with the first tokens of index 0."""
    cumulative_logprob: float = 0.0
    """Of all tokens of this answer so far, where log-probabilities are asked for or beams compared;
    else 0."""
    version: int = 0
    """Of the weights that chose the last token."""
    timings: Timings | None = None
    """With the finish."""
    error: GptMoeError | None = None
    """With the finish of each answer that was open, where the request cannot go on: why."""


def merge(deltas: Sequence[Delta]) -> Delta:
    """Several deltas of the same answer, in order, as one. At least one."""
    if len(deltas) == 1:
        return deltas[0]
    return replace(
        deltas[-1],
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        top_logprobs=tuple(chain.from_iterable(delta.top_logprobs for delta in deltas)),
        prompt_scores=tuple(chain.from_iterable(delta.prompt_scores for delta in deltas)),
    )
