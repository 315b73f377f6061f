"""The parallel layout: pure integers, no torch.

dp ranks each hold a slice of the batch; ep of them share the experts of a layer between them.
Expert groups are consecutive ranks: with dp=4, ep=2 they are (0, 1) and (2, 3), and the copies of
one expert shard live on (0, 2) and (1, 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gptmoe.errors import LayoutError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many ranks each kind of parallelism uses. World = dp; ep divides it."""

    dp: int
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("ep", "dp"):  # dp may have been taken from ep
            if getattr(self, name) < 1:
                raise LayoutError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.dp % self.ep:
            raise LayoutError(
                f"parallel.ep={self.ep} must divide parallel.dp={self.dp}; "
                f"use {_choices(_divisors(self.dp))}"
            )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp

    def check_experts(self, num_experts: Sequence[int]) -> None:
        """Raise LayoutError unless ep divides every layer's number of experts."""
        if self.ep > 1 and not num_experts:
            raise LayoutError(
                f"parallel.ep={self.ep} needs experts, but the model is dense; use parallel.ep=1"
            )
        for count in sorted(set(num_experts)):
            if count % self.ep:
                good = [d for d in _divisors(count) if all(n % d == 0 for n in num_experts)]
                raise LayoutError(
                    f"parallel.ep={self.ep} must divide num_experts={count}; use {_choices(good)}"
                )

    def experts_of(self, rank: int, num_experts: int) -> tuple[int, int]:
        """First and last + 1 of the experts that `rank` owns in a layer of `num_experts`."""
        share = num_experts // self.ep
        first = (rank % self.ep) * share
        return first, first + share

    def expert_groups(self) -> list[list[int]]:
        """Groups of ranks that together hold one copy of every expert."""
        return [list(range(start, start + self.ep)) for start in range(0, self.dp, self.ep)]

    def replica_groups(self) -> list[list[int]]:
        """Groups of ranks that hold the same experts."""
        return [list(range(offset, self.dp, self.ep)) for offset in range(self.ep)]


def resolve(dp: int | None, ep: int) -> Layout:
    """The layout asked for; dp not given = the smallest that fits ep."""
    return Layout(dp=ep if dp is None else dp, ep=ep)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _choices(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
