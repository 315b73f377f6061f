"""The engine of conftest.py with all that a request may ask (stop strings: for one answer)."""

import time
from collections.abc import Iterator
from dataclasses import replace

from gptmoe.generate.delta import Delta, Timings, TokenScore
from gptmoe.generate.request import Request

from .conftest import CountingEngine

CACHED = 1
"""Tokens of every prompt that it claims to have found."""


class FullEngine(CountingEngine):
    """Answer i counts from i + 1 on; each token's log-probability is minus its number / 4."""

    def __init__(self, slots: int = 4, queue: int = 4, most_tokens: int = 10**10) -> None:
        super().__init__(slots, queue)
        self.most_tokens = most_tokens
        """Of an answer: where its context is full."""
        self.seen: list[Request] = []
        self.version = 0

    def add(self, request: Request) -> None:
        most = min(self.most_tokens, request.sampling.max_new_tokens)
        super().add(replace(request, sampling=replace(request.sampling, max_new_tokens=most)))
        self.seen.append(request)

    def step(self) -> list[Delta]:
        self.in_step.set()
        assert self.gate.wait(10)
        return [delta for request in list(self.requests.values()) for delta in self._all(request)]

    def _all(self, request: Request) -> Iterator[Delta]:
        if request.score_only:
            del self.requests[request.request_id]
            yield self._scores(request)
            return
        if request.sampling.stop and request.sampling.n == 1:
            yield self._next(request)
            return
        count = self.produced[request.request_id] = self.produced[request.request_id] + 1
        late = request.deadline_s is not None and time.monotonic() >= request.deadline_s
        done = count + len(request.resume_ids) >= request.sampling.max_new_tokens
        reason = "deadline" if late else "length" if done else ""
        if reason:
            del self.requests[request.request_id]
        for index in range(request.sampling.n):
            yield self._one(request, index, count, reason)

    def _one(self, request: Request, index: int, count: int, reason: str) -> Delta:
        sampling = request.sampling
        text = "一二三四五六七八九十"[(count + len(request.resume_ids) + index - 1) % 10]
        scores = request.score_from and count == 1 and index == 0
        return Delta(
            request_id=request.request_id,
            index=index,
            token_ids=(ord(text),),
            text=text,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=CACHED,
            logprobs=(-count / 4,) if sampling.logprobs else (),
            top_logprobs=(((ord(text), -count / 4), (7, -9.0)),) if sampling.top_logprobs else (),
            prompt_scores=self._scores(request).prompt_scores if scores else (),
            cumulative_logprob=-sum(range(count + 1)) / 4 if sampling.logprobs else 0.0,
            version=self.version,
            timings=Timings(queue_s=0.25, first_token_s=0.5, total_s=count) if reason else None,
        )

    def _scores(self, request: Request) -> Delta:
        """A token is as unlikely as its number in the text; 的 is always the likeliest."""
        scored = list(enumerate(request.prompt_ids))[request.score_from :]
        late = request.deadline_s is not None and time.monotonic() >= request.deadline_s
        return Delta(
            request_id=request.request_id,
            finish_reason="deadline" if late else "length",
            prompt_tokens=len(request.prompt_ids),
            prompt_scores=tuple(TokenScore(-at / 2, token == ord("的")) for at, token in scored),
        )
