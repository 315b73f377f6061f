"""A request's deltas put together: what a caller gets who asked for no stream."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gptmoe.generate.delta import Delta, Timings, TopLogprobs, merge


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of n answers."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] = ()
    """Of each token, if asked for."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    cumulative_logprob: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All that a Call brought; `text` and its like are of the first answer."""

    request_id: str
    choices: tuple[Choice, ...]
    """By index; at least one."""
    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt: not computed again."""
    prompt_logprobs: tuple[float, ...] = ()
    """Of the prompt's tokens but the first, if asked for."""
    weights_version: int = 0
    timings: Timings = field(default_factory=Timings)

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[float, ...]:
        return self.choices[0].logprobs

    @property
    def completion_tokens(self) -> int:
        """Of all answers."""
        return sum(len(choice.token_ids) for choice in self.choices)


def completion(request_id: str, deltas: Iterable[Delta]) -> Completion:
    """Put the deltas of a request that has finished together, whatever their order of indices."""
    parts: dict[int, list[Delta]] = {}
    for delta in deltas:
        parts.setdefault(delta.index, []).append(delta)
    whole = [merge(parts[index]) for index in sorted(parts)]
    timings = [delta.timings for delta in whole if delta.timings]
    return Completion(
        request_id=request_id,
        choices=tuple(_choice(delta) for delta in whole),
        prompt_tokens=whole[0].prompt_tokens,
        cached_tokens=whole[0].cached_tokens,
        prompt_logprobs=tuple(score.logprob for score in whole[0].prompt_scores),
        weights_version=max(delta.version for delta in whole),
        timings=max(timings, key=lambda it: it.total_s, default=Timings()),
    )


def _choice(delta: Delta) -> Choice:
    return Choice(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=delta.finish_reason,
        logprobs=delta.logprobs,
        top_logprobs=delta.top_logprobs,
        cumulative_logprob=delta.cumulative_logprob,
    )
