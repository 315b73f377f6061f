"""One line of JSON for each call: who was answered, how, how fast. No prompt unless asked for.

Calls are begun where they come in: gRPC methods in logged.py, HTTP in web/logged.py, keys at the
edge in edge/server.py. What answers them says more of them to `current()`: LoggedService what the
engine did, and what makes statuses of errors which error it was.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from gptmoe.errors import GptMoeError, RequestError
from gptmoe.generate.delta import Delta, Timings
from gptmoe.generate.request import MAX_ID_CHARACTERS

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_METHOD_CHARACTERS = 100
"""A path is its caller's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What a replica writes about calls to its standard output, which Ray keeps in its logs."""

    access: bool = True
    """A line of JSON for each call."""
    prompts: bool = False
    """With the prompt's text or tokens: a secret of who asks."""


class AccessLog:
    """Writes a line about each call when it ends, however it ends."""

    def __init__(self, config: LogConfig, model: str) -> None:
        self._config, self._model = config, model

    @contextmanager
    def call(self, method: str, transport: str, request_id: str = "") -> Iterator["Entry"]:
        """The call is answered in the block; what ends the block is noted."""
        entry = self.entry(method, transport, request_id)
        try:
            yield entry
        except (asyncio.CancelledError, GeneratorExit):
            entry.leave()
            raise
        except Exception as error:
            entry.fail(error)
            raise
        finally:
            self.write(entry)

    def entry(self, method: str, transport: str, request_id: str = "") -> "Entry":
        """Of a call that begins now, for who may have nothing to write about it."""
        entry = Entry(method, transport, self._model)
        entry.name(request_id)
        return entry

    def write(self, entry: "Entry") -> None:
        """Its line: the call has ended."""
        if self._config.access:
            log.info("%s", entry.line(prompts=self._config.prompts))


class Entry:
    """What is known of one call."""

    def __init__(self, method: str = "", transport: str = "", model: str = "") -> None:
        self.status = "ok"
        self._method, self._transport = method[:MAX_METHOD_CHARACTERS], transport
        self._model, self._request_id, self._field = model, "", ""
        self._began_s = time.monotonic()
        self._at = datetime.now(UTC)
        self._prompts: list[str | tuple[int, ...]] = []
        self._reasons: dict[tuple[int, int], str] = {}
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._completion_tokens = 0
        self._first_s: float | None = None
        self._timings: Timings | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """In the block, and in tasks that are made there, this is the current entry."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    async def within(self, items: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """The same items, each made while this is the current entry.

        Not one block around them all: between two items a generator's context is its caller's.
        """
        while True:
            try:
                with self.active():
                    item = await anext(items)
            except StopAsyncIteration:
                return
            yield item

    def name(self, request_id: str) -> None:
        """What the call is called, unless that is known already."""
        self._request_id = self._request_id or request_id[:MAX_ID_CHARACTERS]

    def ask(self, request_id: str, prompt: str | tuple[int, ...]) -> int:
        """It asks the engine; returns the place of what it asks among what it asked before."""
        self.name(request_id)
        self._prompts.append(prompt)
        return len(self._prompts) - 1

    async def noted(self, place: int, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        """The same deltas, taken note of."""
        async for delta in deltas:
            self.add(place, delta)
            yield delta

    def add(self, place: int, delta: Delta) -> None:
        """Take note of what was said to what was asked at `place`."""
        if delta.token_ids and self._first_s is None:
            self._first_s = time.monotonic() - self._began_s
        if delta.prompt_tokens:
            self._prompt_tokens[place] = delta.prompt_tokens
        if delta.cached_tokens:
            self._cached_tokens[place] = delta.cached_tokens
        self._completion_tokens += len(delta.token_ids)
        if delta.finish_reason:
            self._reasons[place, delta.index] = delta.finish_reason
            self._timings = delta.timings or self._timings

    def leave(self) -> None:
        """Its caller left; if it had failed already, that is why it was cancelled."""
        if self.status == "ok":
            self.status = "cancelled"

    def fail(self, error: Exception, field: str = "") -> None:
        """It ended so. Not with the error's words: these may be the caller's own."""
        ours = isinstance(error, GptMoeError)
        self.refuse(
            type(error).__name__ if ours else "bug",
            field or (error.field if isinstance(error, RequestError) else ""),
        )

    def refuse(self, status: str, field: str) -> None:
        """It ended with this status, for this field."""
        self.status, self._field = status, field[:MAX_ID_CHARACTERS]

    def line(self, *, prompts: bool) -> str:
        """The line, as JSON. Times are seconds: of the engine's clock, else as they were here."""
        timings = self._timings if len(self._prompts) == 1 else None
        first_s = timings.first_token_s if timings else self._first_s
        total_s = timings.total_s if timings else time.monotonic() - self._began_s
        facts: dict[str, Any] = {
            "time": self._at.isoformat(timespec="milliseconds"),
            "request_id": self._request_id,
            "model": self._model,
            "transport": self._transport,
            "method": self._method,
            "status": self.status,
            "field": self._field,
            "finish_reason": ",".join(self._reasons[key] for key in sorted(self._reasons)),
            "prompt_tokens": sum(self._prompt_tokens.values()),
            "cached_tokens": sum(self._cached_tokens.values()),
            "completion_tokens": self._completion_tokens,
            "queue_s": _rounded(timings.queue_s if timings else None),
            "first_token_s": _rounded(first_s if self._completion_tokens else None),
            "total_s": _rounded(total_s),
        }
        if prompts and self._prompts:
            facts["prompt"] = self._prompts[0] if len(self._prompts) == 1 else self._prompts
        return json.dumps(facts, ensure_ascii=False)


_CURRENT: ContextVar[Entry] = ContextVar("entry")


def current() -> Entry:
    """Of the call that is being answered; where there is none, one that nobody writes."""
    return _CURRENT.get(None) or Entry()


def to_stdout() -> None:
    """Write the lines to this process's standard output, as they are. For a replica's start."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)


def _rounded(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s, 6)
