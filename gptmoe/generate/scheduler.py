"""Continuous batching as a pure decision: who runs how many tokens next. No torch, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gptmoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds of one engine."""

    max_batch_size: int = 16
    """Sequences that run at once; each has one slot of the KV cache."""
    max_queue: int = 64
    """Requests that may wait for a slot; one more is refused."""
    token_budget: int = 512
    """Tokens of one step: decoding sequences first, then chunks of prompts. At least
    max_batch_size, so that a prompt gets on in every step, however many sequences decode."""

    def __post_init__(self) -> None:
        for name, least in (("max_batch_size", 1), ("max_queue", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"engine.{name}={getattr(self, name)} must be at least {least}")
        if self.token_budget < self.max_batch_size:
            raise ConfigError(
                f"engine.token_budget={self.token_budget} must be at least "
                f"engine.max_batch_size={self.max_batch_size}: every sequence runs a token a step"
            )


@dataclass(frozen=True, slots=True)
class Progress:
    """A sequence as the scheduler sees it."""

    request_id: str
    slot: int
    known: int
    """Tokens it consists of so far: prompt and generated."""
    computed: int
    """Tokens whose keys and values are in the cache."""


class SlotSpan(Protocol):
    """What computing needs to know of a Span."""

    @property
    def slot(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def samples(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start .. start+count-1 of one sequence enter this step."""

    request_id: str
    slot: int
    start: int
    count: int
    samples: bool
    """True if the last of them yields the next token."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one engine step runs: decoding spans by slot, then chunks of prompts by arrival."""

    spans: tuple[Span, ...]
    num_decoding: int
    version: int = 0
    """Of the weights."""


def plan_step(running: Sequence[Progress], token_budget: int, version: int = 0) -> StepPlan:
    """Plan the next step over sequences in order of arrival, all on one version of the weights.

    Every sequence that only lacks its newest token decodes; what the budget leaves goes to prompts,
    first come first served, in chunks. A budget of at least as many tokens as there are sequences
    is kept, and the oldest prompt always gets on.
    """
    decoding = [_span(p, 1) for p in running if p.known - p.computed == 1]
    decoding.sort(key=lambda span: span.slot)
    left = token_budget - len(decoding)
    chunks = []
    for progress in running:
        missing = progress.known - progress.computed
        if missing > 1 and left > 0:
            chunks.append(_span(progress, min(missing, left)))
            left -= chunks[-1].count
    return StepPlan(tuple(decoding + chunks), len(decoding), version)


def _span(progress: Progress, count: int) -> Span:
    samples = progress.computed + count == progress.known
    return Span(progress.request_id, progress.slot, progress.computed, count, samples)
