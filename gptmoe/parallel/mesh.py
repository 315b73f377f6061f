"""A rank's place in the layout, with the process groups that it talks through."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from .layout import Layout


@dataclass(frozen=True, slots=True)
class Mesh:
    """Always an argument, never a global. A group is None where it would hold this rank alone."""

    layout: Layout
    rank: int
    world_group: dist.ProcessGroup | None = None
    expert_group: dist.ProcessGroup | None = None
    """Ranks that hold one copy of every expert: rows travel here."""
    replica_group: dist.ProcessGroup | None = None
    """Ranks that hold the same experts: expert gradients are summed here."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank."""
        if self.world_group is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.world_group)
        return total

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_group is not None:
            dist.barrier(self.world_group)


def single() -> Mesh:
    """One process on its own."""
    return Mesh(Layout(dp=1), rank=0)


def join(layout: Layout, rank: int, timeout: timedelta = timedelta(minutes=5)) -> Mesh:
    """Make the groups of `layout`. Collective: each rank of the initialised world must call it."""
    if layout.world == 1:
        return single()
    return Mesh(
        layout=layout,
        rank=rank,
        world_group=dist.group.WORLD,
        expert_group=_my_group(layout.expert_groups(), rank, timeout),
        replica_group=_my_group(layout.replica_groups(), rank, timeout),
    )


def _my_group(groups: list[list[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    mine = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                mine = group
    return mine
