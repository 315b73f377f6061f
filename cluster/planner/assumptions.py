"""What of the data sheets is reached in practice: few constants, each with its reason.

They are the same for every model, layout and device. tests/bench/bench_planner.py shows how far
predictions made with them are from published runs; a measured machine may replace any of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """How real machines and our training differ from the data sheets."""

    product_efficiency: float = 0.76
    """Share of the peak rate in large matrix products, at the clocks of a long run."""
    memory_efficiency: float = 0.8
    """Share of the memory's rate in operations that only read and write."""
    link_efficiency: float = 0.7
    """Share of a link's rate in collectives of many megabytes."""
    passes: float = 8.0
    """Times that a stored activation crosses the memory in a step: written, read by the next
    operation, read again in the backward pass, its gradient written and read; and what unfused
    operations write in between."""
    recompute_share: float = 0.3
    """Of those, what computing it a second time adds: written and read."""
    layer_kernels: int = 60
    """Kernels of one dense layer, forward and backward."""
    moe_kernels: int = 80
    """Further kernels of a layer with experts: routing, sorting, dispatch, combine."""
    expert_imbalance: float = 1.1
    """Rows of the fullest expert rank over the mean; capacity bounds it by the capacity factor."""
    reserve: float = 0.05
    """Share of the memory lost to fragments of the allocator."""
    narrow_weights: bool = False
    """Weights are kept in the type of the products beside the float32 ones, and gradients are added
    up inside the products, as Megatron does. Ours are cast at each use, and added up apart."""
    overlap: float = 0.0
    """Share of the gradients' reduction hidden behind the backward pass: our steps hide nothing."""

    def __post_init__(self) -> None:
        assert 0 < self.product_efficiency <= 1
        assert 0 <= self.reserve < 1
        assert 0 <= self.overlap <= 1
