"""What the figure shows, as plain data: means over seeds, and what the seeds span. Pure."""

import statistics
from collections.abc import Sequence
from typing import Any

from .results import Results

_POINTS = 80
"""Of a curve of single steps: means of as many equal parts."""


def curves(results: Results) -> list[dict[str, Any]]:
    """One object a variant with finished runs; points are (step, mean, lowest, highest)."""
    found = []
    for it in results.models:
        runs = [results.runs[it.variant, seed] for seed in results.seeds_of(it.variant)]
        if runs:
            found.append(
                {
                    "arm": it.variant.arm,
                    "name": it.variant.name,
                    "flops": 3 * it.flops.total * (results.config.train.batch_tokens or 0),
                    "validation": over_seeds([run.validation for run in runs]),
                    "training": over_seeds([thinned(run.training) for run in runs]),
                    "load": over_seeds([thinned(run.busiest) for run in runs]),
                }
            )
    return found


def over_seeds(
    many: Sequence[Sequence[tuple[float, float]]],
) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) at the points that all curves have."""
    shared = [dict(curve) for curve in many]
    common = set.intersection(*(set(curve) for curve in shared))
    values = {x: [curve[x] for curve in shared] for x in sorted(common)}
    return [(x, statistics.fmean(ys), min(ys), max(ys)) for x, ys in values.items()]


def thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most _POINTS points: the mean of each part at its last step."""
    size = max(1, -(-len(curve) // _POINTS))
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(float(part[-1][0]), statistics.fmean(y for _, y in part)) for part in parts]
