"""A prompt in, text out: what gRPC and HTTP have in common.

Both front ends turn what they receive into a Call, and the typed errors of gptmoe.errors into their
statuses; everything between is here, once.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from gptmoe.errors import DeadlineExceeded, NotFound, Unavailable
from gptmoe.generate.delta import Delta
from gptmoe.generate.params import SamplingParams, check
from gptmoe.generate.request import MAX_ID_CHARACTERS, Request, make_request
from gptmoe.text import Tokenizer

from .bridge import EngineThread
from .completion import Completion, completion
from .names import ALONE, Alone, Names, Ticket
from .result_cache import ResultCache, key_of
from .scoring import ScoreCall, Scored, score_requests, scored
from .texts import Texts, apart

Keep = Callable[[list[Delta]], None]

ANSWERS = ("cmpl", "chatcmpl")
"""What OpenAI's API writes before a request's id, and a dash, where it names an answer."""

SCORES_AT_ONCE = 8
"""Continuations of one call that the engine has at a time: one call shall not fill the queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request for text."""

    prompt: str | tuple[int, ...]
    """A text or its token ids."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    named: bool = False
    """Whether the caller chose request_id: then no replica may run another request of that id."""
    ticket: Ticket = ALONE
    """Tells one that goes on elsewhere from another one of that id."""
    seeded: bool = False
    """Whether the caller chose the seed: then the answer may come from the result cache."""
    model: str = ""
    """Of what name the model must be; empty: any."""
    resume_ids: tuple[int, ...] = ()
    """What an earlier answer has said."""
    score_only: bool = False
    """Whether the prompt is computed and nothing behind it. One answer."""
    priority: int = 0
    """Lower goes first."""
    deadline_s: float | None = None
    """Seconds from now after which nobody wants the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a caller may know of the model."""

    name: str
    parameters: int
    active_parameters: int
    max_seq_len: int
    vocab_size: int
    dtype: str
    num_layers: int
    d_model: int
    num_heads: int
    num_experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Running:
    """A request that the engine has taken."""

    request: Request
    deltas: AsyncIterator[Delta]


class Service:
    """One model and its running engine."""

    def __init__(
        self,
        engine: EngineThread,
        tokenizer: Tokenizer,
        card: ModelCard,
        names: Names | None = None,
        results: ResultCache | None = None,
    ) -> None:
        self._engine = engine
        self.tokenizer = tokenizer
        self._names = names or Alone()
        self._results = results
        self.card = card
        self.texts = Texts(tokenizer, card.max_seq_len)
        self.draining = False
        """New requests are refused; running ones go on."""
        self.version = 0
        """Of the weights that new requests get."""

    @asynccontextmanager
    async def opened(self, call: Call) -> AsyncIterator[Running]:
        """Have the engine take a call, and end it with the block.

        Refusals are raised here, before anything was generated: RequestError, NotFound,
        AlreadyRunning, Overloaded, DeadlineExceeded, and Unavailable while `draining`. The deltas
        raise DeadlineExceeded when the call's time is over, ClusterError if the engine stops.
        """
        request = await self._request(call)
        if call.named or call.ticket.goes_on:  # another replica has told of this id
            await self._names.claim(call.request_id, call.ticket)
        else:
            self._names.note(call.request_id, call.ticket)
        try:
            kept, keep = self._known(call, request)
            source = nullcontext(_each(kept)) if kept else self._admitted(request)
            async with source as found, aclosing(self._followed(call, found, keep)) as deltas:
                yield Running(request, deltas)
        finally:
            self._names.let_go(call.request_id, call.ticket)

    async def stream(self, call: Call) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of the call; errors as in `opened`. Leaving early ends the request."""
        async with self.opened(call) as running:
            async for delta in running.deltas:
                yield delta

    async def complete(self, call: Call) -> Completion:
        """All that the call brings; errors as in `opened`."""
        async with self.opened(call) as running:
            return completion(call.request_id, [delta async for delta in running.deltas])

    async def score(self, call: ScoreCall) -> tuple[Scored, ...]:
        """How likely each continuation is; errors as in `opened`."""
        deadline_s = self._accepted(call)
        size = sum(map(len, (call.prompt, *call.continuations)))
        known = (self.tokenizer, self.card.max_seq_len)
        requests = await apart(size, score_requests, *known, call, deadline_s)
        places = asyncio.Semaphore(SCORES_AT_ONCE)

        async def one(request: Request) -> Scored:
            async with places, aclosing(self._engine.stream(request)) as stream:
                deltas = [delta async for delta in stream]
            if deltas[-1].finish_reason == "deadline":
                raise DeadlineExceeded(f"{_late(call.deadline_s)} before all was scored")
            return scored(request, deltas)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request)) for request in requests]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return tuple(task.result() for task in tasks)

    async def abort(self, request_id: str) -> None:
        """End a request on whatever replica it runs; its caller gets finish_reason "abort".

        Where none of that id runs, the id of an answer of OpenAI's API stands for its request.
        Raises NotFound if that does not run either, Unavailable if nobody can tell for now.
        """
        check(request_id != "", "request_id", "an empty text", "the id of a running request")
        wanted = f"at most {MAX_ID_CHARACTERS} characters"
        found = f"{len(request_id)} characters"
        check(len(request_id) <= MAX_ID_CHARACTERS, "request_id", found, wanted)
        if await self._engine.abort(request_id):
            return
        try:
            await self._names.abort(request_id)
        except NotFound:
            kind, _, inner = request_id.partition("-")
            if kind not in ANSWERS or not inner:
                raise
            await self.abort(inner)

    def model(self, name: str = "") -> ModelCard:
        """What is served; raises NotFound if `name` is not its name."""
        if name not in ("", self.card.name):
            asked = name if len(name) <= MAX_ID_CHARACTERS else f"{name[:MAX_ID_CHARACTERS]}..."
            raise NotFound(f"model {asked!r} is not served here; {self.card.name!r} is")
        return self.card

    def check(self, stall_s: float) -> None:
        """Raise ClusterError unless the engine is alive and goes on (see EngineThread.check)."""
        self._engine.check(stall_s)

    def stop(self) -> None:
        """Stop the engine's thread."""
        self._engine.stop()

    def _accepted(self, call: Call | ScoreCall) -> float | None:
        """The deadline by the engine's clock, of a call that is not refused at once."""
        if self.draining and not call.ticket.goes_on:
            why = "takes no new requests: an operator drains it; ask another server"
            raise Unavailable(f"{self.card.name} {why}", None)
        self.model(call.model)
        if call.deadline_s is None:
            return None
        if call.deadline_s <= 0:
            raise DeadlineExceeded("the deadline has passed before the request arrived")
        return time.monotonic() + call.deadline_s

    async def _request(self, call: Call) -> Request:
        deadline_s = self._accepted(call)
        make = partial(
            make_request,
            resume_ids=call.resume_ids,
            priority=call.priority,
            deadline_s=deadline_s,
            score_only=call.score_only,
        )
        known = (self.tokenizer, self.card.max_seq_len)
        size = len(call.prompt)
        return await apart(size, make, *known, call.request_id, call.prompt, call.sampling)

    def _known(self, call: Call, request: Request) -> tuple[tuple[Delta, ...], Keep | None]:
        """The answer, if it is known already, and how to keep one; only where noise is fixed."""
        if self._results is None or not (call.sampling.greedy or call.seeded):
            return (), None
        key = key_of(request, self.version)
        keep = partial(self._results.put, key, version=self.version)
        return self._results.get(key, call.request_id), keep

    @asynccontextmanager
    async def _admitted(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        """The deltas of a request once the engine has taken it; raises its refusal."""
        stream = self._engine.stream(request)
        first = asyncio.create_task(anext(stream))
        try:
            await asyncio.sleep(0)  # now the engine has it in its inbox, and what follows behind it
            taken = asyncio.wrap_future(self._engine.between_steps(_nothing))
            await asyncio.wait((first, taken), return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                first.result()
            yield _from(first, stream)
        finally:
            first.cancel()
            await asyncio.wait((first,))
            if not first.cancelled():
                first.exception()  # heard already, or of no interest any more
            await stream.aclose()

    async def _followed(
        self, call: Call, source: AsyncIterator[Delta], keep: Keep | None
    ) -> AsyncGenerator[Delta, None]:
        """The deltas as a caller gets them; `keep` gets all of them once the last one is there."""
        deltas: list[Delta] = []
        unfinished = call.sampling.n
        tokens = 0
        async for delta in source:
            tokens += len(delta.token_ids)
            if delta.finish_reason == "deadline":
                if delta.token_ids:
                    yield replace(delta, finish_reason="", timings=None)
                raise DeadlineExceeded(
                    f"{_late(call.deadline_s)} after {tokens} tokens were generated; "
                    "ask for fewer, or give more time"
                )
            if keep:
                deltas.append(delta)
            unfinished -= bool(delta.finish_reason)
            if not unfinished and keep:
                keep(deltas)
            if not unfinished and call.named:  # who has the last delta may use the id again
                await self._names.release(call.request_id, call.ticket)
            yield delta


async def _from(first: asyncio.Task[Delta], rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield await first
    async for delta in rest:
        yield delta


async def _each(kept: Iterable[Delta]) -> AsyncIterator[Delta]:
    for delta in kept:
        yield delta


def _late(deadline_s: float | None) -> str:
    return f"the deadline of {deadline_s or 0:g} s has passed"


def _nothing() -> None:
    """A command for the engine's thread that tells how far it is."""
