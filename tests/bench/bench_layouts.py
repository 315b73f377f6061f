"""How far each layout is from one process: the table of the README.

    python -m tests.bench.bench_layouts [--json FILE]

A 4-layer model with experts and dropout in float64, six steps of SGD with clipping: the largest
relative difference of loss and norm over the steps, and of the weights behind them.
"""

import argparse
import json
from pathlib import Path

from gptmoe.parallel.layout import Layout
from tests.ranks.cover import Cell
from tests.ranks.matrix import LAYOUTS, assemble, case_of, describe, one_process
from tests.ranks.pool import RankPool
from tests.ranks.sgd import Trained, train

GOAL = 1e-8


def difference(found: Trained, expected: Trained) -> float:
    """The largest relative one of losses and norms."""
    pairs = [*zip(found.losses, expected.losses, strict=True)]
    pairs += zip(found.norms, expected.norms, strict=True)
    return max(abs(ours / theirs - 1) for ours, theirs in pairs)


def plain_cell(layout: Layout) -> Cell:
    """The layout without recompute or copies."""
    schedule = "interleaved" if layout.chunks > 1 else "1f1b"
    return {
        "layout": layout,
        "case": "plain",
        "recompute": "none",
        "schedule": schedule,
        "copies": 1,
    }


def main() -> None:
    """Print a row a layout."""
    parser = argparse.ArgumentParser(description="Each layout against one process.")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    arguments = parser.parse_args()
    rows = []
    with RankPool(4) as pool:
        for layout in LAYOUTS[1:]:
            case = case_of(plain_cell(layout))
            expected = one_process(case)
            weights = assemble([expected])
            ranks = pool.run(layout.world, train, layout, case)
            largest = max(
                float((ours - weights[name]).norm() / weights[name].norm().clamp(min=1e-12))
                for name, ours in assemble(ranks).items()
            )
            rows.append((describe(layout), difference(ranks[0], expected), largest))
            print("| {} | {:.0e} | {:.0e} |".format(*rows[-1]), flush=True)
    worst = max(max(row[1:]) for row in rows)
    if arguments.json:
        facts = {"title": "each layout", "reached": worst <= GOAL, "rows": rows}
        arguments.json.write_text(json.dumps([facts], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
