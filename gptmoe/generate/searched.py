"""Beam search in the engine: which lane of the cache each living beam goes on in."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gptmoe.text import Tokenizer

from .answers import Outcome
from .beams import Beams, Hypothesis
from .delta import Delta
from .output import TextStream, end_ids
from .request import Request
from .scheduler import Entry


class Searched:
    """The n best of a beam search, said at its end."""

    together = True

    def __init__(self, request: Request, tokenizer: Tokenizer, max_seq_len: int) -> None:
        params = request.sampling
        self._request = request
        self._beams = Beams(
            params,
            request.prompt_ids,
            end_ids=end_ids(tokenizer, params),
            stream=TextStream(tokenizer, params.stop),
            max_new_tokens=min(params.max_new_tokens, max_seq_len - len(request.prompt_ids)),
        )
        self._lane_of = [0]
        """Of each living beam, in the beams' order: a place among the entry's lanes."""
        self._open = True

    def step(self, entry: Entry, logits: Mapping[str, Tensor]) -> Outcome:
        """See Answers.step."""
        lanes = entry.live
        rows = [logits[lanes[place].key] for place in self._lane_of]
        step = self._beams.advance(torch.stack(rows))
        if step.done:
            return Outcome(deltas=self.close(""), ended=list(lanes))
        parents = [self._lane_of[parent] for parent in step.parents]
        self._lane_of = assign(parents, len(lanes))
        outcome = Outcome(parents=list(lanes), resting=list(lanes))
        for place, parent, token in zip(self._lane_of, parents, step.tokens, strict=True):
            outcome.parents[place] = lanes[parent]
            outcome.tokens[lanes[place].key] = token
            outcome.resting.remove(lanes[place])
        return outcome

    def close(self, reason: str) -> list[Delta]:
        """See Answers.close; with a reason, of a search that was cut short."""
        if not self._open:
            return []
        self._open = False
        found = self._beams.best(self._request.sampling.n, reason)
        deltas = [self._delta(index, one) for index, one in enumerate(found)]
        return deltas + [
            self._nothing(index, reason or "stop")
            for index in range(len(found), self._request.sampling.n)
        ]

    def _delta(self, index: int, found: Hypothesis) -> Delta:
        params = self._request.sampling
        return Delta(
            request_id=self._request.request_id,
            index=index,
            token_ids=found.token_ids,
            text=found.text,
            finish_reason=found.finish_reason,
            prompt_tokens=len(self._request.prompt_ids),
            logprobs=found.logprobs if params.logprobs else (),
            top_logprobs=found.top_logprobs,
            cumulative_logprob=found.cumulative_logprob,
        )

    def _nothing(self, index: int, reason: str) -> Delta:
        """An answer that the search has not found."""
        return Delta(
            request_id=self._request.request_id,
            index=index,
            finish_reason=reason,
            prompt_tokens=len(self._request.prompt_ids),
        )


def assign(parents: list[int], lanes: int) -> list[int]:
    """A lane for each child of these lanes: the first of each stays, so that little is copied.

    Others take lanes of nobody who stays.
    """
    spare = [lane for lane in range(lanes) if lane not in parents]
    stayed = set[int]()
    places = []
    for parent in parents:
        places.append(spare.pop(0) if parent in stayed else parent)
        stayed.add(parent)
    return places
