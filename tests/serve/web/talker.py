"""Stands where an engine's thread stands, and a server in front of it."""

import asyncio
import math
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI

from gptmoe.errors import ClusterError, GptMoeError, Unauthenticated
from gptmoe.generate.delta import Delta, TokenScore
from gptmoe.generate.output import TextStream
from gptmoe.generate.request import Request
from gptmoe.text import Tokenizer


class Talker:
    """Says the tokens of `said` in turn, answer k from the k-th on, one a step; no thread, no Ray.

    A token's log-probability is -1 at the first step, -2 at the second; the likeliest at each place
    are the token, then its successors in the vocabulary. A prompt's tokens have -0.5 each, and the
    likeliest at their places are their successors, farthest first.
    """

    def __init__(self, tokenizer: Tokenizer, said: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.gate = threading.Event()
        self.begin(said)

    def begin(self, said: Sequence[int]) -> None:
        """As new: an application is slow to build, so tests share one."""
        self.said = said
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.gate.set()
        self.breaks_after: int | None = None
        self.most_tokens: float = math.inf
        self.refusal: GptMoeError | None = None

    def between_steps(self, call: Callable[[], None]) -> Future[None]:
        """There are no steps: at once."""
        done: Future[None] = Future()
        done.set_result(call())
        return done

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        if self.refusal:
            raise self.refusal
        sampling = request.sampling
        texts: list[TextStream | None] = [
            TextStream(self.tokenizer, sampling.stop) for _ in range(sampling.n)
        ]
        self.running.add(request.request_id)
        try:
            step = 0
            while any(text is not None for text in texts):
                await self._may_go_on(step)
                for index, text in enumerate(texts):
                    if text is not None:
                        delta = self._next(request, index, step, text)
                        if delta.finish_reason:
                            texts[index] = None
                        yield delta
                step += 1
        finally:
            self.running.discard(request.request_id)

    def check(self, stall_s: float) -> None:
        if self.refusal:
            raise self.refusal

    def stop(self) -> None:
        self.refusal = ClusterError("this replica's engine has stopped; send the request again")

    async def _may_go_on(self, step: int) -> None:
        await asyncio.sleep(0)
        while not self.gate.is_set():
            await asyncio.sleep(0.002)
        if step == self.breaks_after:
            raise ClusterError("this replica's engine has stopped; send the request again")

    def _next(self, request: Request, index: int, step: int, text: TextStream) -> Delta:
        sampling = request.sampling
        if request.score_only:
            return Delta(
                request_id=request.request_id,
                finish_reason="length",
                prompt_tokens=len(request.prompt_ids),
                prompt_scores=self._scores(request) if request.score_from else (),
            )
        token = self.said[(step + index) % len(self.said)]
        piece, reason = text.push(token), ""
        if request.deadline_s is not None and time.monotonic() > request.deadline_s:
            reason = "deadline"
        elif text.stopped:
            reason = "stop"
        elif step + 1 >= min(sampling.max_new_tokens, self.most_tokens):
            piece, reason = piece + text.finish(), "length"
        logprob = -1.0 - step
        return Delta(
            request_id=request.request_id,
            index=index,
            token_ids=(token,),
            text=piece,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=1,
            logprobs=(logprob,) if sampling.logprobs else (),
            top_logprobs=(
                tuple((token + k, logprob - k) for k in range(sampling.top_logprobs)),
            ) if sampling.top_logprobs else (),
            prompt_scores=self._scores(request) if request.score_from and not step + index else (),
            version=7,
        )  # fmt: skip

    def _scores(self, request: Request) -> tuple[TokenScore, ...]:
        top = request.sampling.top_logprobs
        return tuple(
            TokenScore(-0.5, False, tuple((token + k, -0.5 + k / 4) for k in range(top)[::-1]))
            for token in request.prompt_ids[1:]
        )


class Keyring:
    """Knows one key."""

    def __init__(self, key: str) -> None:
        self.key = key

    def check(self, authorization: str | None) -> None:
        if authorization != f"Bearer {self.key}":
            raise Unauthenticated("the key is missing or wrong; send Authorization: Bearer KEY")


@contextmanager
def served(app: FastAPI) -> Iterator[httpx.Client]:
    """The application behind a real server on a free port of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=address, timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
