"""The parallel layout: pure integers, no torch.

World = dp x tp x pp. A rank has a place (stage, data, slice): its pipeline stage, its part of the
batch, its slice of the weights. Ranks count slices first, then data, then stages, so that the ranks
of a tensor group, which talk most, are neighbours. With dp=2, tp=2, pp=2:

    stage 0: data 0 on ranks 0 1, data 1 on ranks 2 3
    stage 1: data 0 on ranks 4 5, data 1 on ranks 6 7

Experts are spread over all dp x tp ranks of a stage, ep of which together hold one copy of them:
with ep=2 ranks (0, 1) and (2, 3). With `expert_tp` they are cut by tensor parallelism like every
other weight, and spread over dp alone: (0, 2) and (1, 3).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from gptmoe.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in the grid; each number counts from 0."""

    stage: int
    data: int
    slice: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many ranks each kind of parallelism uses."""

    dp: int = 1
    """Data parallel: ranks with different samples."""
    tp: int = 1
    """Tensor parallel: ranks that hold slices of each weight."""
    ep: int = 1
    """Expert parallel: ranks that share the experts of a layer. Divides dp x tp."""
    pp: int = 1
    """Pipeline parallel: stages that hold different layers."""
    expert_tp: bool = False
    """Experts are cut by tp, too, instead of being spread over its ranks; ep then divides dp."""

    def __post_init__(self) -> None:
        for name in ("ep", "dp", "tp", "pp"):  # dp may have been taken from ep
            if getattr(self, name) < 1:
                raise LayoutError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.expert_span % self.ep:
            span = "parallel.dp" if self.expert_tp or self.tp == 1 else "parallel.dp x parallel.tp"
            raise LayoutError(
                f"parallel.ep={self.ep} must divide {span}={self.expert_span}; "
                f"use {choices(divisors(self.expert_span))}"
            )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.pp

    @property
    def expert_span(self) -> int:
        """Ranks of a stage over which its experts may be spread."""
        return self.dp if self.expert_tp else self.dp * self.tp

    def place(self, rank: int) -> Place:
        """Where `rank` stands."""
        others, slice_ = divmod(rank, self.tp)
        stage, data = divmod(others, self.dp)
        return Place(stage, data, slice_)

    def expert_index(self, rank: int) -> int:
        """Which of the ep parts of its stage's experts `rank` holds."""
        place = self.place(rank)
        column = place.data if self.expert_tp else place.data * self.tp + place.slice
        return column % self.ep

    def experts_of(self, rank: int, num_experts: int) -> tuple[int, int]:
        """First and last + 1 of the experts that `rank` owns in a layer of `num_experts`."""
        share = num_experts // self.ep
        first = self.expert_index(rank) * share
        return first, first + share

    def check_experts(self, num_experts: Sequence[int]) -> None:
        """Raise LayoutError unless ep divides every layer's number of experts."""
        if self.ep > 1 and not num_experts:
            raise LayoutError(
                f"parallel.ep={self.ep} needs experts, but the model is dense; use parallel.ep=1"
            )
        for count in sorted(set(num_experts)):
            if count % self.ep:
                good = [d for d in divisors(count) if all(n % d == 0 for n in num_experts)]
                raise LayoutError(
                    f"parallel.ep={self.ep} must divide num_experts={count}; use {choices(good)}"
                )

    def expert_groups(self) -> list[list[int]]:
        """Groups of ranks that together hold one copy of every expert of their stage."""

        def group(rank: int, place: Place) -> Hashable:
            if self.expert_tp:
                return place.stage, place.slice, place.data // self.ep
            return place.stage, (place.data * self.tp + place.slice) // self.ep

        return self._groups(group)

    def replica_groups(self) -> list[list[int]]:
        """Groups of ranks that hold the same experts."""

        def group(rank: int, place: Place) -> Hashable:
            return place.stage, place.slice if self.expert_tp else 0, self.expert_index(rank)

        return self._groups(group)

    def tensor_groups(self) -> list[list[int]]:
        """Groups of ranks that hold the slices of the same weights, for the same samples."""
        return self._groups(lambda rank, place: (place.stage, place.data))

    def data_groups(self) -> list[list[int]]:
        """Groups of ranks that hold the same slices, for different samples."""
        return self._groups(lambda rank, place: (place.stage, place.slice))

    def pipelines(self) -> list[list[int]]:
        """Groups of ranks that hold the stages, in order, for the same samples and slices."""
        return self._groups(lambda rank, place: (place.data, place.slice))

    def _groups(self, key: Callable[[int, Place], Hashable]) -> list[list[int]]:
        """Ranks with the same key, each group and the list of them in rank order."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for rank in range(self.world):
            groups[key(rank, self.place(rank))].append(rank)
        return list(groups.values())


def resolve(
    dp: int | None, ep: int, tp: int = 1, pp: int = 1, *, expert_tp: bool = False
) -> Layout:
    """The layout asked for; dp not given = the smallest that fits ep."""
    if dp is None:
        dp = ep if expert_tp or min(ep, tp) < 1 else ep // math.gcd(ep, tp)
    return Layout(dp=dp, tp=tp, ep=ep, pp=pp, expert_tp=expert_tp)


def divisors(number: int) -> list[int]:
    """The numbers that divide `number`, from 1 up."""
    return [d for d in range(1, number + 1) if number % d == 0]


def choices(numbers: Sequence[int]) -> str:
    """Numbers as a message offers them: `1, 2 or 4`."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
