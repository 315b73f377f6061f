"""Where steps and hidden states go: pure functions of the parts."""

from collections.abc import Sequence
from dataclasses import dataclass

from gptmoe.shard.parts import Part


@dataclass(frozen=True, slots=True)
class Route:
    """Whom one rank hears and tells."""

    source: int
    """Sends its steps, and its hidden states unless that is the engine."""
    target: int
    """Gets its hidden states or scores; the engine behind the last stage."""


def route_of(parts: Sequence[Part], rank: int) -> Route:
    """The route of a rank: from the engine through the stages, back to the engine."""
    engine, part = len(parts), parts[rank]
    if part.experts_only:
        return Route(engine, engine)
    before = _find(parts, part, part.stage - 1)
    behind = _find(parts, part, part.stage + 1)
    return Route(
        engine if before is None else before,
        engine if behind is None else behind,
    )


def entries(parts: Sequence[Part]) -> list[int]:
    """The ranks that the engine tells of a step: the first stage, and those of experts alone."""
    return [rank for rank in range(len(parts)) if route_of(parts, rank).source == len(parts)]


def exits(parts: Sequence[Part]) -> list[int]:
    """The ranks whose scores the engine gets: the last stage."""
    return [
        rank
        for rank, part in enumerate(parts)
        if not part.experts_only and route_of(parts, rank).target == len(parts)
    ]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Ranks that one rank has messages from and for; the engine's is len(parts)."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


def neighbours(parts: Sequence[Part], rank: int) -> Neighbours:
    """The neighbours of a rank, or of the engine, on all routes."""
    routes = [route_of(parts, other) for other in range(len(parts))]
    ways = {(route.source, other) for other, route in enumerate(routes)}
    ways |= {(other, route.target) for other, route in enumerate(routes)}
    return Neighbours(
        tuple(sorted(source for source, target in ways if target == rank)),
        tuple(sorted(target for source, target in ways if source == rank)),
    )


def _find(parts: Sequence[Part], like: Part, stage: int) -> int | None:
    """The rank on another stage of the same samples and slice."""
    for rank, part in enumerate(parts):
        same = (part.stage, part.data, part.slice) == (stage, like.data, like.slice)
        if same and not part.experts_only:
            return rank
    return None
