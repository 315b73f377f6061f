"""All-to-all with skewed routing: all rows to one rank against a balanced exchange.

    python -m tests.bench.bench_exchange [--rounds 9] [--json FILE]

Two ranks dispatch and combine, forward and backward. The busiest rank gets as many rows in both
cases; in the skewed one the other gets none. Goal: at most 1.3 times the time.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from gptmoe.model.routing import Routing, Statistics
from gptmoe.model.turns import straight
from gptmoe.parallel.expert import AllToAllDispatcher
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.mesh import join
from tests.bench.side_by_side import Comparison, table, write_json
from tests.ranks.pool import RankPool

D_MODEL, EXPERTS, ROWS = 512, 8, 4096
"""Rows that the busiest rank gets."""


def routing(rank: int, skewed: bool) -> Routing:
    """Balanced: each rank sends half of its rows to each; skewed: all of them to rank 0."""
    rows = ROWS // 2 if skewed else ROWS
    expert_R = torch.arange(rows) % (EXPERTS // 2 if skewed else EXPERTS)
    return Routing(
        token_R=torch.arange(rows),
        expert_R=expert_R,
        weight_R=torch.ones(rows),
        num_experts=EXPERTS,
        losses={},
        count=lambda: Statistics.zero(EXPERTS),
    )


def exchange_in_turns(rank: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of balanced and skewed exchanges."""
    mesh = join(Layout(dp=2, ep=2), rank)
    assert mesh.expert_group is not None
    dispatcher = AllToAllDispatcher(mesh.expert_group, 2)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * rounds + 4):
        skewed = bool(number % 2)
        plan = routing(rank, skewed)
        h_TD = torch.randn(len(plan.token_R), D_MODEL, requires_grad=True)
        mesh.barrier()
        began_s = time.perf_counter()
        sent = straight(dispatcher.dispatch(h_TD, plan))
        straight(dispatcher.combine(sent.rows_RD, sent)).sum().backward()
        mesh.barrier()
        if number >= 4:
            seconds[skewed].append(time.perf_counter() - began_s)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Skewed against balanced exchanges.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    arguments = parser.parse_args()
    with RankPool(2) as pool:
        balanced, skewed = pool.run(2, exchange_in_turns, arguments.rounds)[0]
    comparison = Comparison(
        title="skewed exchange against a balanced one",
        ours="all rows to rank 0",
        peer="rows spread evenly",
        goal=1 / 1.3,
        ours_s=skewed,
        peer_s=balanced,
    )
    print(table([comparison]))
    print(
        f"skewed takes {statistics.median(skewed) / statistics.median(balanced):.2f} times as long"
    )
    if arguments.json:
        write_json(arguments.json, [comparison])


if __name__ == "__main__":
    main()
