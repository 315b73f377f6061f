"""A rank's place in the layout, with the process groups that it talks through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Layout, Place


@dataclass(frozen=True, slots=True)
class Mesh:
    """Always an argument, never a global. A group is None where it would hold this rank alone."""

    layout: Layout
    rank: int
    world_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None
    """Ranks that hold the same parameters, experts apart, for other samples."""
    tensor_group: dist.ProcessGroup | None = None
    """Ranks that hold the other slices of the same weights, for the same samples."""
    expert_group: dist.ProcessGroup | None = None
    """Ranks that hold one copy of every expert: rows travel here."""
    replica_group: dist.ProcessGroup | None = None
    """Ranks that hold the same experts: expert gradients are summed here."""
    tied_group: dist.ProcessGroup | None = None
    """First and last stage, which share the token table; None on the stages between."""

    @property
    def place(self) -> Place:
        """Where this rank stands."""
        return self.layout.place(self.rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over data ranks and stages, on every rank.

        Slices compute the same things of the same samples: slice 0 speaks for them.
        """
        if self.world_group is None:
            return tensor
        total = tensor.clone() if self.place.slice == 0 else torch.zeros_like(tensor)
        dist.all_reduce(total, group=self.world_group)
        return total

    def gather(self, row: Sequence[float]) -> Tensor:
        """Each rank's row of numbers, [world, len(row)] on the CPU, on every rank. Collective."""
        rows = torch.zeros(self.layout.world, len(row), dtype=torch.float64)
        rows[self.rank] = torch.tensor(row, dtype=torch.float64)
        if self.world_group is not None:
            dist.all_reduce(rows, group=self.world_group)
        return rows

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_group is not None:
            dist.barrier(self.world_group)

    def neighbour(self, stages: int) -> int:
        """The rank so many stages on (or back), in a circle, for the same samples and slices."""
        layout, place = self.layout, self.place
        stage = (place.stage + stages) % layout.pp
        return (stage * layout.dp + place.data) * layout.tp + place.slice


def single() -> Mesh:
    """One process on its own."""
    return Mesh(Layout(), rank=0)


def join(
    layout: Layout, rank: int, timeout: timedelta = timedelta(minutes=5), *, spare: int = 0
) -> Mesh:
    """Make the groups of `layout`. Collective: each rank of the initialised world must call it.

    The world may have `spare` more processes than the layout: these call `stand_by`.
    """
    if layout.world == 1:
        return single()

    world = _my_group(_everybody(layout), rank, timeout) if spare else dist.group.WORLD
    groups = (_my_group(kind, rank, timeout) for kind in _kinds(layout))
    return Mesh(layout, rank, world, *groups)


def stand_by(layout: Layout, timeout: timedelta = timedelta(minutes=5)) -> None:
    """What a process beyond the layout does while the others `join`: groups are made by all."""
    if layout.world == 1:
        return
    for groups in (_everybody(layout), *_kinds(layout)):
        _my_group(groups, -1, timeout)
    _my_group(_everybody(layout), -1, timeout)


def separate_barrier(mesh: Mesh, timeout: timedelta = timedelta(minutes=5)) -> Callable[[], None]:
    """A barrier over the layout for another thread: it never meets the others' collectives.

    Collective, right behind `join`.
    """
    if mesh.world_group is None:
        return lambda: None
    group = _my_group(_everybody(mesh.layout), mesh.rank, timeout)
    return lambda: dist.barrier(group)


def _kinds(layout: Layout) -> list[list[list[int]]]:
    """The groups of each kind, in the order of Mesh's fields."""
    return [
        layout.data_groups(),
        layout.tensor_groups(),
        layout.expert_groups(),
        layout.replica_groups(),
        layout.tied_groups(),
    ]


def _everybody(layout: Layout) -> list[list[int]]:
    return [list(range(layout.world))]


def _my_group(groups: list[list[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    mine = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                mine = group
    return mine
