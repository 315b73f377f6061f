"""From scores to what is said of one request: its answers, drawn token by token.

Letters: V vocabulary, N rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from gptmoe.text import Tokenizer

from .admission import lanes_of
from .delta import Delta, Timings, TokenScore, TopLogprobs
from .output import TextStream, end_ids
from .request import Request
from .sampling import choose, log_probabilities, token_scores
from .scheduler import Entry, Lane


@dataclass(slots=True)
class Outcome:
    """What a step brought for one request."""

    deltas: list[Delta] = field(default_factory=list)
    parents: list[Lane] = field(default_factory=list)
    """If not empty: live lanes go on as these, by place, before the tokens below."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Next token by lane."""
    resting: list[Lane] = field(default_factory=list)
    """Live lanes that have nothing to do for now."""
    ended: list[Lane] = field(default_factory=list)


class Answers(Protocol):
    """How one request's scores become tokens and text."""

    @property
    def together(self) -> bool:
        """Whether the scores of all live lanes are needed at once."""
        ...

    def step(self, entry: Entry, logits: Mapping[str, Tensor]) -> Outcome:
        """Scores [V] for the next token of lanes that are not idle, by lane.

        Raises CheckpointError where these are no numbers.
        """
        ...

    def close(self, reason: str) -> list[Delta]:
        """The last delta of each answer that has not ended."""
        ...


class _Answer:
    """One of n answers."""

    def __init__(self, index: int, stream: TextStream) -> None:
        self.index = index
        self.stream = stream
        self.cumulative_logprob = 0.0
        self.open = True


class Drawn:
    """n answers, each drawn with noise of its own; lane i holds answer i."""

    together = False

    def __init__(self, request: Request, tokenizer: Tokenizer, max_seq_len: int) -> None:
        self._request = request
        self._end_ids = end_ids(tokenizer, request.sampling)
        self._max_seq_len = max_seq_len
        stop, already = request.sampling.stop, request.resume_ids
        self._answers = {
            lane_key(request.request_id, index): _Answer(
                index, TextStream(tokenizer, stop, already)
            )
            for index in range(request.sampling.n)
        }

    def step(self, entry: Entry, logits: Mapping[str, Tensor]) -> Outcome:
        """See Answers.step. All draw their first token from the scores of the first lane."""
        first, *others = entry.live
        outcome = Outcome()
        if others and others[0].idle:
            outcome.parents = [first] * len(entry.live)
            logits = {lane.key: logits[first.key] for lane in entry.live}
        lanes = [lane for lane in entry.live if lane.key in logits]
        # All draw before one says anything: what cannot be drawn from ends all answers alike.
        outcome.tokens = {lane.key: self._draw(lane, logits[lane.key]) for lane in lanes}
        for lane in lanes:
            delta = self._say(lane, outcome.tokens[lane.key], logits[lane.key])
            outcome.deltas.append(delta)
            if delta.finish_reason:
                outcome.ended.append(lane)
        return outcome

    def close(self, reason: str) -> list[Delta]:
        """See Answers.close."""
        deltas = []
        for answer in self._answers.values():
            if answer.open:
                answer.open = False
                text = answer.stream.finish()
                deltas.append(self._delta(answer, text=text, finish_reason=reason))
        return deltas

    def _draw(self, lane: Lane, logits_V: Tensor) -> int:
        prompt, params = len(self._request.prompt_ids), self._request.sampling
        known, index = lane.tokens, self._answers[lane.key].index
        return choose(logits_V, params, known[:prompt], known[prompt:], index)

    def _say(self, lane: Lane, token: int, logits_V: Tensor) -> Delta:
        request, params = self._request, self._request.sampling
        answer = self._answers[lane.key]
        prompt = len(request.prompt_ids)
        logprob, top = None, TopLogprobs()
        if params.logprobs or params.top_logprobs:
            logprob, top = log_probabilities(logits_V, token, params.top_logprobs)
            answer.cumulative_logprob += logprob
        ended = token in self._end_ids
        text = "" if ended else answer.stream.push(token)
        full = len(lane.tokens) + 1 >= min(prompt + params.max_new_tokens, self._max_seq_len)
        reason = "stop" if ended or answer.stream.stopped else "length" if full else ""
        if reason:
            answer.open = False
            text += answer.stream.finish()
        return self._delta(
            answer,
            token_ids=(token,),
            text=text,
            finish_reason=reason,
            logprobs=() if logprob is None else (logprob,),
            top_logprobs=(top,) if params.top_logprobs else (),
        )

    def _delta(self, answer: _Answer, **new: object) -> Delta:
        return Delta(
            request_id=self._request.request_id,
            index=answer.index,
            prompt_tokens=len(self._request.prompt_ids),
            cumulative_logprob=answer.cumulative_logprob,
            **new,  # type: ignore[arg-type]
        )


class Scored:
    """A prompt whose tokens are scored, and nothing else."""

    together = False

    def __init__(self, request: Request) -> None:
        self._request = request
        self._open = True

    def step(self, entry: Entry, logits: Mapping[str, Tensor]) -> Outcome:
        """See Answers.step: the prompt has been computed, which is all."""
        return Outcome(deltas=self.close("length"), ended=list(entry.live))

    def close(self, reason: str) -> list[Delta]:
        """See Answers.close."""
        if not self._open:
            return []
        self._open = False
        prompt_tokens = len(self._request.prompt_ids)
        return [
            Delta(
                request_id=self._request.request_id,
                finish_reason=reason,
                prompt_tokens=prompt_tokens,
            )
        ]


@dataclass(slots=True, eq=False)
class Account:
    """The engine's account of one request."""

    request: Request
    entry: Entry
    answers: Answers
    arrived_s: float
    begun_s: float | None = None
    first_token_s: float | None = None
    scores: list[TokenScore] = field(default_factory=list)
    """Of the prompt, not sent yet."""
    pending: dict[str, Tensor] = field(default_factory=dict)
    """Scores [V] for the next token, by lane, that have not been used."""

    def note_scores(self, lane: Lane, rows_NV: Tensor) -> None:
        """Keep how likely the next N tokens of the prompt are.

        Raises CheckpointError for scores that are no numbers.
        """
        if count := len(rows_NV):
            wanted = lane.tokens[lane.score_from : lane.score_from + count]
            self.scores += token_scores(rows_NV, wanted, self.request.sampling.top_logprobs)
            lane.score_from += count

    def closed(self, last: Delta, now_s: float) -> Delta:
        """The last delta of an answer, with the times of now and what the cache knew."""
        begun_s = now_s if self.begun_s is None else self.begun_s
        first_s = now_s if self.first_token_s is None else self.first_token_s
        arrived_s, cached = self.arrived_s, min(self.entry.cached, len(self.request.prompt_ids))
        timings = Timings(begun_s - arrived_s, first_s - arrived_s, now_s - arrived_s)
        return replace(last, timings=timings, cached_tokens=cached)


def lane_key(request_id: str, index: int) -> str:
    """Names a lane; no two requests have the same."""
    return f"{index}/{request_id}"


def request_of(key: str) -> str:
    """The id of the request that a lane belongs to."""
    return key.partition("/")[2]


def lanes_for(request: Request) -> list[Lane]:
    """The sequences of a request: the first computes the prompt, the others branch off it."""
    tokens = [*request.prompt_ids, *request.resume_ids]
    keys = [lane_key(request.request_id, index) for index in range(lanes_of(request))]
    others = [Lane(key, list(tokens), idle=True) for key in keys[1:]]
    return [Lane(keys[0], tokens, request.score_from), *others]
