"""Pairwise cover: few combinations in which any two values that go together meet.

    pairwise({"layout": [...], "recompute": [...]}, is_valid=lambda layout, recompute: ...)

Most faults need at most two settings to show (Kuhn, Wallace and Gallo 2004, IEEE Transactions on
Software Engineering 30(6)).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Cell = dict[str, Any]


def every(dimensions: Mapping[str, Sequence[Any]], is_valid: Callable[..., bool]) -> list[Cell]:
    """All valid combinations, the last dimension changing fastest."""
    cells = (dict(zip(dimensions, values, strict=True)) for values in product(*dimensions.values()))
    return [cell for cell in cells if is_valid(**cell)]


def pairwise(dimensions: Mapping[str, Sequence[Any]], is_valid: Callable[..., bool]) -> list[Cell]:
    """Valid combinations with every pair of values that any valid one has; greedy, repeatable."""
    cells = every(dimensions, is_valid)
    pairs = [_pairs(cell, dimensions) for cell in cells]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(cells)), key=lambda index: len(pairs[index] & missing))
        chosen.append(cells[best])
        missing -= pairs[best]
    return chosen


def _pairs(cell: Cell, dimensions: Mapping[str, Sequence[Any]]) -> set[tuple[object, ...]]:
    places = [(name, dimensions[name].index(value)) for name, value in cell.items()]
    return set(combinations(places, 2))
