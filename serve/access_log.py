"""One line of JSON for each call: who was answered, how, how fast. No prompt unless asked for."""

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from gptmoe.errors import GptMoeError, RequestError
from gptmoe.generate.delta import Delta, Timings

from .service import Call, Running, Service

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What a replica writes about calls to its standard output, which Ray keeps in its logs."""

    access: bool = True
    """A line of JSON for each call."""
    prompts: bool = False
    """With the prompt's text or tokens: a secret of who asks."""


class LoggedService(Service):
    """A Service that writes a line about each call when it ends, however it ends."""

    def __init__(self, *parts: Any, config: LogConfig, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._config = config

    @asynccontextmanager
    async def opened(self, call: Call) -> AsyncIterator[Running]:
        """See Service.opened."""
        if not self._config.access:
            async with super().opened(call) as running:
                yield running
            return
        entry = Entry(call, self.card.name)
        try:
            async with super().opened(call) as running:
                yield replace(running, deltas=entry.noted(running.deltas))
        except (asyncio.CancelledError, GeneratorExit):
            entry.status = "cancelled"
            raise
        except Exception as error:
            entry.fail(error)
            raise
        finally:
            log.info("%s", entry.line(prompts=self._config.prompts))


class Entry:
    """What is known of one call."""

    def __init__(self, call: Call, model: str) -> None:
        self.status = "ok"
        self._call, self._model = call, model
        self._began_s = time.monotonic()
        self._at = datetime.now(UTC)
        self._field = ""
        self._reasons: dict[int, str] = {}
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._first_s: float | None = None
        self._timings: Timings | None = None

    async def noted(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        """The same deltas, taken note of."""
        async for delta in deltas:
            self.add(delta)
            yield delta

    def add(self, delta: Delta) -> None:
        """Take note of what was said."""
        if delta.token_ids and self._first_s is None:
            self._first_s = time.monotonic() - self._began_s
        self._prompt_tokens = delta.prompt_tokens or self._prompt_tokens
        self._cached_tokens = delta.cached_tokens or self._cached_tokens
        self._completion_tokens += len(delta.token_ids)
        if delta.finish_reason:
            self._reasons[delta.index] = delta.finish_reason
            self._timings = delta.timings or self._timings

    def fail(self, error: Exception) -> None:
        """It ended so. Not with the error's words: these may be the caller's own."""
        self.status = type(error).__name__ if isinstance(error, GptMoeError) else "bug"
        self._field = error.field if isinstance(error, RequestError) else ""

    def line(self, *, prompts: bool) -> str:
        """The line, as JSON. Times are seconds: of the engine's clock, else as they were here."""
        call, timings = self._call, self._timings
        first_s = timings.first_token_s if timings else self._first_s
        total_s = timings.total_s if timings else time.monotonic() - self._began_s
        facts: dict[str, Any] = {
            "time": self._at.isoformat(timespec="milliseconds"),
            "request_id": call.request_id,
            "model": self._model,
            "transport": call.transport,
            "status": self.status,
            "field": self._field,
            "finish_reason": ",".join(self._reasons[index] for index in sorted(self._reasons)),
            "prompt_tokens": self._prompt_tokens,
            "cached_tokens": self._cached_tokens,
            "completion_tokens": self._completion_tokens,
            "queue_s": _rounded(timings.queue_s if timings else None),
            "first_token_s": _rounded(first_s if self._completion_tokens else None),
            "total_s": _rounded(total_s),
        }
        if prompts:
            facts["prompt"] = call.prompt
        return json.dumps(facts, ensure_ascii=False)


def to_stdout() -> None:
    """Write the lines to this process's standard output, as they are. For a replica's start."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)


def _rounded(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s, 6)
