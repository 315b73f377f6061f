"""Speed of the expert products on a CPU: our loop against torch's grouped kernel.

    python tests/bench/bench_experts.py [--rounds 9] [--json FILE]

Both linear layers of the experts with GELU between, 512 wide, 2,048 inside, forward and backward,
rows spread unevenly over the experts as by an untrained router. The loop stays the rule as long as
it is not clearly slower.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gptmoe.model.experts import Experts
from tests.bench.side_by_side import Comparison, compare, table, write_json

D_MODEL, D_FF = 512, 2048
CASES = [
    (experts, rows, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for experts in (8, 64)
    for rows in (4096, 512)
]
THREADS = 2


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor, rows: list[int]) -> Tensor:
    """The grouped kernel with a bias."""
    counts = torch.tensor(rows)
    ends = counts.cumsum(0, dtype=torch.int32)
    y_RO: Tensor = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends)
    return y_RO + bias_EO.repeat_interleave(counts, dim=0, output_size=len(x_RI))


def grouped_experts(experts: Experts, rows_RD: Tensor, rows: list[int]) -> Tensor:
    """What Experts computes, with the grouped kernel."""
    hidden_RF = grouped_linear(rows_RD, experts.up_weight, experts.up_bias, rows)
    hidden_RF = F.gelu(hidden_RF, approximate="tanh")
    return grouped_linear(hidden_RF, experts.down_weight, experts.down_bias, rows)


def loop_against_grouped(
    num_experts: int, num_rows: int, dtype: torch.dtype, rounds: int
) -> Comparison:
    """Forward and backward of one expert layer."""
    generator = torch.Generator().manual_seed(0)
    experts = Experts(num_experts, D_MODEL, D_FF).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    popularity_E = torch.rand(num_experts, generator=generator).square()
    expert_R = torch.multinomial(popularity_E, num_rows, replacement=True, generator=generator)
    rows = torch.bincount(expert_R, minlength=num_experts).tolist()
    rows_RD = torch.randn(num_rows, D_MODEL, generator=generator).to(dtype).requires_grad_()
    inputs = [rows_RD, *experts.parameters()]

    def both_ways(output_RD: Tensor) -> None:
        torch.autograd.grad(output_RD, inputs, torch.ones_like(output_RD))

    def ours() -> None:
        both_ways(experts(rows_RD, rows))

    def grouped() -> None:
        both_ways(grouped_experts(experts, rows_RD, rows))

    return compare(
        f"{num_experts} experts, {num_rows} rows, {dtype}".replace("torch.", ""),
        ours=("loop", ours),
        peer=("grouped_mm", grouped),
        goal=0.9,
        rounds=rounds,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Expert products on a CPU, side by side.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    comparisons = []
    for num_experts, num_rows, dtype in CASES:
        comparisons.append(loop_against_grouped(num_experts, num_rows, dtype, arguments.rounds))
        print(table(comparisons[-1:]), flush=True)
    if arguments.json:
        write_json(arguments.json, comparisons)


if __name__ == "__main__":
    main()
