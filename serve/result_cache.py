"""Whole answers kept for requests that come again: least recently used, bounded by memory.

Only answers that are a function of their key: greedy ones, and those whose caller chose the seed.
The key holds the version of the weights, so that after a refresh old answers are never found.
"""

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from gptmoe.errors import ConfigError
from gptmoe.generate.delta import Delta, Timings, merge
from gptmoe.generate.request import Request

ENTRY_BYTES = 256
"""What an entry takes beside its answer: key, links and objects."""

_NO_MATTER = ("request_id", "priority", "deadline_s")
"""Fields of a request that do not change its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Answers that are kept."""

    results_mb: float = 0.0
    """Memory of each replica for whole answers, in MB (10^6 bytes); 0: none are kept."""

    def __post_init__(self) -> None:
        if not 0 <= self.results_mb < float("inf"):
            raise ConfigError(
                f"cache.results_mb={self.results_mb:g} must be at least 0 (0 keeps no answers)"
            )


def key_of(request: Request, version: int) -> bytes:
    """A digest of all that an answer depends on: any field not named in _NO_MATTER."""
    matter = [field.name for field in fields(request) if field.name not in _NO_MATTER]
    parts = [version, *((name, getattr(request, name)) for name in matter)]
    return hashlib.sha256(repr(parts).encode()).digest()


class ResultCache:
    """Answers by key. Not thread safe: it belongs to one event loop."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._answers: OrderedDict[bytes, bytes] = OrderedDict()
        self.used_bytes = 0

    def get(self, key: bytes, request_id: str) -> tuple[Delta, ...]:
        """The answer's deltas for a new request, one for each index; empty if there is none.

        All of the prompt counts as cached, and no time as spent.
        """
        stored = self._answers.get(key)
        if stored is None:
            return ()
        self._answers.move_to_end(key)
        found: tuple[Delta, ...] = pickle.loads(stored)
        return tuple(
            replace(
                delta,
                request_id=request_id,
                cached_tokens=delta.prompt_tokens,
                timings=Timings(),
            )
            for delta in found
        )

    def put(self, key: bytes, deltas: Iterable[Delta], version: int) -> None:
        """Keep an answer that is whole, and all of it by weights of `version`; else nothing.

        Answers that were not asked for the longest make room; one over the bound is not kept.
        """
        parts: dict[int, list[Delta]] = {}
        for delta in deltas:
            if delta.version != version:
                return
            parts.setdefault(delta.index, []).append(delta)
        whole = tuple(merge(parts[index]) for index in sorted(parts))
        if not all(delta.finish_reason in ("stop", "length") for delta in whole):
            return
        stored = pickle.dumps(whole, pickle.HIGHEST_PROTOCOL)  # bytes: their size is known
        if len(stored) + ENTRY_BYTES > self._most_bytes:
            return
        self._drop(key)
        self._answers[key] = stored
        self.used_bytes += len(stored) + ENTRY_BYTES
        while self.used_bytes > self._most_bytes:
            self._drop(next(iter(self._answers)))

    def _drop(self, key: bytes) -> None:
        stored = self._answers.pop(key, None)
        if stored is not None:
            self.used_bytes -= len(stored) + ENTRY_BYTES
