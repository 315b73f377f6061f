"""What one engine step runs, as data, and how a token budget is shared out. No torch, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .slots import Copy, Trim


class SlotSpan(Protocol):
    """What computing needs to know of a Span."""

    @property
    def slot(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def outputs(self) -> int: ...


class SlotCopy(Protocol):
    """What copying needs to know of a Copy."""

    @property
    def source(self) -> int: ...
    @property
    def target(self) -> int: ...
    @property
    def count(self) -> int: ...


class SlotTrim(Protocol):
    """What forgetting needs to know of a Trim."""

    @property
    def slot(self) -> int: ...
    @property
    def count(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start .. start+count-1 of one sequence enter this step."""

    key: str
    """Of the sequence."""
    slot: int
    start: int
    count: int
    outputs: int
    """Of how many of the last of them scores are wanted: 1 where the next token is drawn."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one engine step runs: copies, decoding spans by slot, then chunks of prompts."""

    spans: tuple[Span, ...]
    num_decoding: int
    version: int = 0
    """Of the weights."""
    copies: tuple[Copy, ...] = ()
    """Within the cache, in this order, before anything is computed."""
    trims: tuple[Trim, ...] = ()
    """Then; none of a slot that was copied to. A cache may take the memory back."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A sequence as planning sees it."""

    key: str
    slot: int
    known: int
    """Tokens it consists of so far: prompt and generated."""
    computed: int
    """Tokens whose keys and values are in the cache."""
    score_from: int = 0
    """Tokens from this place on are to be scored; 0: none."""
    most: int = 0
    """Tokens it may compute in one step; 0: any number."""


def plan_step(
    running: Sequence[Progress],
    token_budget: int,
    version: int = 0,
    copies: tuple[Copy, ...] = (),
) -> StepPlan:
    """Plan the next step over sequences in their order, all on one version of the weights.

    Every sequence that only lacks its newest token decodes; what the budget leaves goes to prompts
    in chunks. A budget of at least as many tokens as there are sequences is kept.
    """
    decoding = [_span(p, 1) for p in running if p.known - p.computed == 1]
    decoding.sort(key=lambda span: span.slot)
    prompts = [p for p in running if p.known - p.computed > 1]
    wanted = [min(p.known - p.computed, p.most or p.known) for p in prompts]
    counts = share_out(wanted, max(0, token_budget - len(decoding)))
    chunks = [_span(p, count) for p, count in zip(prompts, counts, strict=True) if count]
    return StepPlan((*decoding, *chunks), len(decoding), version, copies)


def share_out(wanted: Sequence[int], budget: int) -> list[int]:
    """Tokens that each prompt gets of a budget.

    The first in line gets up to half of it, so that short prompts cannot starve a long one; the
    rest goes to the shortest first, so that a long one does not hold up the short.
    """
    got = [0] * len(wanted)
    if not wanted:
        return got
    got[0] = min(wanted[0], -(-budget // 2))
    left = budget - got[0]
    for index in sorted(range(len(wanted)), key=lambda index: (wanted[index], index)):
        more = min(wanted[index] - got[index], left)
        got[index] += more
        left -= more
    return got


def _span(progress: Progress, count: int) -> Span:
    """Scores are wanted where a token is followed by one to score, or by the one to draw."""
    end = progress.computed + count
    draws = end == progress.known
    scored = 0
    if progress.score_from:
        first = max(progress.score_from - 1, progress.computed)
        scored = max(0, end - first - draws)
    return Span(progress.key, progress.slot, progress.computed, count, scored + draws)
