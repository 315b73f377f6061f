"""How the tests call a Service, and what it tells of its requests."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from gptmoe.errors import AlreadyRunning, NotFound
from gptmoe.generate.params import SamplingParams
from serve.completion import Completion
from serve.names import Ticket
from serve.service import Call, Service

from .full_engine import FullEngine

GREEDY = SamplingParams(temperature=0, max_new_tokens=3)
SEEDED = SamplingParams(seed=7, max_new_tokens=3)
ENDLESS = SamplingParams(max_new_tokens=10**9)


class Told:
    """Names that remember what they were told; `engine` shows what was admitted by then."""

    def __init__(self, engine: FullEngine) -> None:
        self.engine = engine
        self.calls: list[str] = []
        self.taken: set[str] = set()
        self.elsewhere: set[str] = set()

    def _say(self, what: str, request_id: str) -> None:
        self.calls.append(f"{what} {request_id} {len(self.engine.seen)}")

    async def claim(self, request_id: str, ticket: Ticket) -> None:
        if request_id in self.taken | self.elsewhere:
            raise AlreadyRunning(f"request_id {request_id!r} is running")
        self._say("claim", request_id)
        self.taken.add(request_id)

    def note(self, request_id: str, ticket: Ticket) -> None:
        self._say("note", request_id)
        self.taken.add(request_id)

    async def release(self, request_id: str, ticket: Ticket) -> None:
        await asyncio.sleep(0.01)
        self._say("release", request_id)
        self.taken.discard(request_id)

    def let_go(self, request_id: str, ticket: Ticket) -> None:
        if request_id in self.taken:
            self._say("let_go", request_id)
            self.taken.discard(request_id)

    async def abort(self, request_id: str) -> None:
        if request_id not in self.elsewhere:
            raise NotFound(f"no request {request_id!r}")
        self._say("abort", request_id)


def run(task: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await task

    return asyncio.run(bounded())


def call(sampling: SamplingParams = SEEDED, request_id: str = "mine", **given: Any) -> Call:
    return Call(prompt="春风", sampling=sampling, request_id=request_id, **given)


def complete(service: Service, asked: Call) -> Completion:
    done: Completion = run(service.complete(asked))
    return done
