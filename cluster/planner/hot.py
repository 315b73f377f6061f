"""Hot experts: which to hold on more shards, by the rows that each has answered. Pure.

Experts of a layer get unequal shares of the tokens, and a step waits for the busiest shard. An
expert that lies on several shards shares its rows between them (gptmoe/shard/dispatch.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptmoe.shard.parts import ExpertSpan, Part

Rows = Mapping[tuple[int, int], float]
"""Rows answered by (layer, expert)."""

WORTH = 0.01
"""A further copy must bring down the busiest shard's share by at least this part of the mean."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Experts of one layer to hold on every shard of its stage that holds experts."""

    layer: int
    experts: tuple[int, ...]
    before: float
    """Rows of the busiest shard over the mean, as it is."""
    after: float
    """The same with these copies."""

    def __str__(self) -> str:
        hot = ", ".join(f'"{self.layer}:{expert}"' for expert in self.experts)
        return f"{hot} (busiest shard {self.before:.2f} -> {self.after:.2f} times the mean)"


def propose(rows: Rows, parts: Sequence[Part], above: float = 1.2) -> list[Proposal]:
    """For each layer whose busiest shard has over `above` times the mean: the fewest experts, the
    busiest ones first, whose copies bring it down to that, or as far as copies can."""
    found = []
    for layer in sorted({layer for layer, _ in rows}):
        load = {expert: count for (at, expert), count in rows.items() if at == layer and count > 0}
        holders = [part for part in parts if part.experts_in(layer)]
        if len(holders) < 2 or not load:
            continue
        before = now = _busiest(load, holders, layer, ())
        hot: tuple[int, ...] = ()
        for expert in sorted(load, key=lambda expert: -load[expert]):
            if now <= above:
                break
            then = _busiest(load, holders, layer, (*hot, expert))
            if now - then >= WORTH:
                hot, now = (*hot, expert), then
        if hot:
            found.append(Proposal(layer, tuple(sorted(hot)), before, now))
    return found


def rows_answered(counters: Sequence[Mapping[str, float]]) -> dict[tuple[int, int], float]:
    """Of all shards, from their heartbeats' counters `rows/LAYER/EXPERT`."""
    total: dict[tuple[int, int], float] = {}
    for of_shard in counters:
        for name, count in of_shard.items():
            kind, _, rest = name.partition("/")
            if kind == "rows":
                layer, _, expert = rest.partition("/")
                key = int(layer), int(expert)
                total[key] = total.get(key, 0.0) + count
    return total


def spans_of(hot: Sequence[str]) -> tuple[ExpertSpan, ...]:
    """`1:3` says expert 3 of layer 1. Raises ValueError for another form."""
    pairs = [tuple(map(int, word.split(":"))) for word in hot]
    return tuple(ExpertSpan(layer, expert, expert + 1) for layer, expert in pairs)


def _busiest(
    load: Mapping[int, float], holders: Sequence[Part], layer: int, hot: Sequence[int]
) -> float:
    """Rows of the busiest holder over the mean, with `hot` on all of them."""
    held = [{*part.experts_in(layer), *hot} for part in holders]
    copies = {expert: sum(expert in mine for mine in held) for expert in load}
    shares = [sum(load[e] / copies[e] for e in mine if e in load) for mine in held]
    return max(shares) / (sum(shares) / len(shares))
