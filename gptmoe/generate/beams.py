"""Beam search as a state machine: scores of the living beams in, the next tokens out.

The engine computes one row of scores for each living beam, `Beams.advance` says whose child each
next living beam is and which token it adds. The prompt's own row is the first: one living beam.

Each of `num_beam_groups` groups is a search with num_beams / num_beam_groups = G beams:

    * A candidate is a living beam and a token; its total is the sum of its tokens'
      log-probabilities, after bias and penalties (`sampling.adjusted`, made to add up to 1).
    * Candidates are ranked by total, less diversity_penalty for each beam of an earlier group that
      took the same token in this step (the Hamming diversity of arXiv 1610.02424 with its lambda).
      The penalty ranks, and enters no total. Of equals the lower parent goes first, then the
      lower token.
    * The G best that do not end live on. One that ends (end token, stop string, or no room for
      more) is finished if it is among the G best of all, and dropped if not. Of each row
      the 2 G + 2 num_beams likeliest tokens are looked at, and one more for each end token: where
      nearly all of these hold a stop string, fewer than G live on.
    * A finished one scores total / length ** length_penalty; the length is that of the answer in
      tokens, its end token too (as transformers; arXiv 1609.08144, equation 14, has
      ((5 + length) / 6) instead). A group keeps its G best.
    * A group stops when it has G finished ones and no living one can beat the worst of these. No
      total grows, so the best that a living beam of total t may score is t / length **
      length_penalty at the longest length if the penalty is above 0, else at the next one. Hence
      nothing is lost by stopping (transformers: early_stopping="never").

Letters: B living beams, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor

from .delta import TopLogprobs
from .output import TextStream
from .params import SamplingParams
from .sampling import adjusted, likeliest, log_softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """An answer that a search has found."""

    token_ids: tuple[int, ...]
    """With the end token, if it ended by one."""
    text: str
    """Without the end token or the stop string."""
    logprobs: tuple[float, ...]
    """The model's own, of each token."""
    top_logprobs: tuple[TopLogprobs, ...]
    """At each token's place, where the request asks for them."""
    cumulative_logprob: float
    """The sum of `logprobs`."""
    score: float
    """What hypotheses are compared by."""
    finish_reason: str
    """"stop" or "length"; of an unfinished one, what `Beams.best` was told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The next living beams: row i of the next scores belongs to beam i."""

    parents: tuple[int, ...]
    """Whose child each is: a row of the scores that led here."""
    tokens: tuple[int, ...]
    """What each adds to its parent."""
    done: bool
    """Whether none is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beam:
    stream: TextStream
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    total: float = 0.0
    parent: int = 0


@dataclass(slots=True)
class _Group:
    living: list[_Beam]
    finished: list[Hypothesis] = field(default_factory=list)
    """Best first; of equals, the earlier."""


class _Row(NamedTuple):
    """What one living beam's scores say."""

    options: TopLogprobs
    """The likeliest tokens after bias and penalties."""
    logprob_V: Tensor
    """The model's own log-probabilities."""
    top: TopLogprobs


class _Candidate(NamedTuple):
    rank: float
    parent: int
    token: int
    total: float


class Beams:
    """One request's beam search.

    `end_ids` end a hypothesis, `stream` is a fresh stream of the request's text (it finds stop
    strings), `max_new_tokens` is what the request and the context have room for.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        end_ids: frozenset[int],
        stream: TextStream,
        max_new_tokens: int,
    ) -> None:
        self.params = params
        self.prompt_ids = prompt_ids
        self.end_ids = end_ids
        self.max_new_tokens = max_new_tokens
        self.size = params.num_beams // params.num_beam_groups
        self.length = 0
        """Tokens of each living beam."""
        self._groups = [_Group([_Beam(stream=stream)]) for _ in range(params.num_beam_groups)]

    @property
    def living(self) -> tuple[tuple[int, ...], ...]:
        """The tokens behind the prompt of each beam that `advance` wants a row for, in order."""
        return tuple(beam.token_ids for beam in self._living())

    def _living(self) -> list[_Beam]:
        """At first one for all groups: they start from the prompt's row."""
        beams = [beam for group in self._groups for beam in group.living]
        return beams if self.length else beams[:1]

    def advance(self, logits_BV: Tensor) -> Step:
        """Take one step with the scores (or log-probabilities) behind each living beam, in order.

        Raises CheckpointError as `sampling.adjusted`.
        """
        pairs = zip(logits_BV, self._living(), strict=True)
        rows = [self._row(logits_V, beam) for logits_V, beam in pairs]
        first, offset = self.length == 0, 0
        self.length += 1
        taken: Counter[int] = Counter()
        for group in self._groups:
            width = 0 if first else len(group.living)
            taken.update(self._grow(group, rows, offset, taken))
            offset += width
        living = self._living()
        return Step(
            parents=tuple(beam.parent for beam in living),
            tokens=tuple(beam.token_ids[-1] for beam in living),
            done=not living,
        )

    def best(self, n: int, reason: str = "") -> tuple[Hypothesis, ...]:
        """The `n` best hypotheses of all groups, best first; fewer if fewer were found.

        With a reason (of a search that was cut short) living beams count as ended by it.
        """
        found = [hypothesis for group in self._groups for hypothesis in group.finished]
        if reason:
            found += [self._ended(beam, reason) for beam in self._living()]
        return tuple(sorted(found, key=attrgetter("score"), reverse=True)[:n])

    def _row(self, logits_V: Tensor, beam: _Beam) -> _Row:
        logprob_V = log_softmax(logits_V)
        scores_V = adjusted(logits_V, self.params, self.prompt_ids, beam.token_ids)
        # Enough for G that live and G that end by a stop string, though all end tokens and all
        # that other groups took are among the likeliest.
        count = 2 * self.size + len(self.end_ids) + 2 * self.params.num_beams
        top = likeliest(logprob_V, self.params.top_logprobs)
        return _Row(likeliest(log_softmax(scores_V), count), logprob_V, top)

    def _grow(
        self, group: _Group, rows: Sequence[_Row], offset: int, taken: Counter[int]
    ) -> list[int]:
        """One step of one group; the tokens that it took."""
        grown: list[int] = []
        living: list[_Beam] = []
        for place, candidate in enumerate(self._candidates(group, rows, offset, taken)):
            if len(living) == self.size:
                break
            parent = group.living[candidate.parent - offset]
            beam = self._child(parent, candidate, rows[candidate.parent])
            reason = self._reason(beam)
            if not reason:
                living.append(beam)
            elif place < self.size:
                group.finished.append(self._ended(beam, reason))
            else:
                continue
            grown.append(candidate.token)
        group.finished.sort(key=attrgetter("score"), reverse=True)  # stable: of equals, the earlier
        del group.finished[self.size :]
        group.living = living if self._open(group, living) else []
        return grown

    def _candidates(
        self, group: _Group, rows: Sequence[_Row], offset: int, taken: Counter[int]
    ) -> list[_Candidate]:
        """Ranked, best first. A token of no probability is none."""
        found = [
            _Candidate(total - self.params.diversity_penalty * taken[token], row, token, total)
            for row, beam in enumerate(group.living, offset)
            for token, logprob in rows[row].options
            if (total := beam.total + logprob) > -math.inf
        ]
        return sorted(found, key=lambda it: (-it.rank, it.parent, it.token))

    def _child(self, parent: _Beam, candidate: _Candidate, row: _Row) -> _Beam:
        token, stream = candidate.token, parent.stream.fork()
        text = "" if token in self.end_ids else stream.push(token)
        return _Beam(
            stream=stream,
            token_ids=(*parent.token_ids, token),
            text=parent.text + text,
            logprobs=(*parent.logprobs, float(row.logprob_V[token])),
            top_logprobs=(*parent.top_logprobs, row.top) if row.top else (),
            total=candidate.total,
            parent=candidate.parent,
        )

    def _reason(self, beam: _Beam) -> str:
        if beam.token_ids[-1] in self.end_ids or beam.stream.stopped:
            return "stop"
        return "length" if self.length == self.max_new_tokens else ""

    def _ended(self, beam: _Beam, reason: str) -> Hypothesis:
        return Hypothesis(
            token_ids=beam.token_ids,
            text=beam.text + beam.stream.fork().finish(),
            logprobs=beam.logprobs,
            top_logprobs=beam.top_logprobs,
            cumulative_logprob=math.fsum(beam.logprobs),
            score=self._score(beam.total, max(1, self.length)),
            finish_reason=reason,
        )

    def _open(self, group: _Group, living: Sequence[_Beam]) -> bool:
        """Whether a living beam can still beat a finished one."""
        if len(group.finished) < self.size or not living:
            return bool(living)
        longest = self.params.length_penalty > 0
        length = self.max_new_tokens if longest else self.length + 1
        possible = self._score(max(beam.total for beam in living), length)
        return possible > group.finished[-1].score

    def _score(self, total: float, length: int) -> float:
        return total / length**self.params.length_penalty
