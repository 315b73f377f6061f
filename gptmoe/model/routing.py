"""The router's contract: which token goes to which expert, with what weight, and what it cost.

Letters: T tokens, D model width, E experts, G groups, R rows (copies of tokens on their way to an
expert).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """T tokens as G equal groups in order; padding (`valid_T` False) is not routed or counted."""

    tokens_per_group: int
    valid_T: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of one routing, detached; they add up over microbatches, layers' ranks and steps."""

    load_E: Tensor
    """Tokens that chose each expert, before dropping."""
    dropped: Tensor
    """Tokens that found their expert full."""
    tokens: Tensor
    """Tokens routed."""
    entropy: Tensor
    """Sum over tokens of the entropy of the router's distribution, in nats."""

    @classmethod
    def zero(cls, num_experts: int) -> "Statistics":
        """Of no tokens."""
        none = torch.zeros((), dtype=torch.long)
        return cls(torch.zeros(num_experts, dtype=torch.long), none, none, none.double())

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.load_E + other.load_E,
            self.dropped + other.dropped,
            self.tokens + other.tokens,
            self.entropy + other.entropy,
        )


@dataclass(frozen=True, slots=True)
class Routing:
    """Row r carries token `token_R[r]` to expert `expert_R[r]` and comes back times `weight_R[r]`.

    A token may have 0 to E rows. `losses` hold sums over the groups, unweighted, in at least
    float32.
    """

    token_R: Tensor
    expert_R: Tensor
    weight_R: Tensor
    num_experts: int
    losses: dict[str, Tensor]
    count: Callable[[], Statistics]

    @property
    def statistics(self) -> Statistics:
        """Counted when asked for: generation does not ask."""
        return self.count()


class Router(Protocol):
    """Chooses experts. `route` writes no buffer: it may run again for recompute."""

    def route(self, h_TD: Tensor, groups: Groups) -> Routing:
        """Decide for all tokens; capacity and balance losses are computed within each group."""
        ...

    def update(self, statistics: Statistics) -> None:
        """Learn from one optimizer step's statistics of the whole global batch."""
        ...


def rank_within(key_T: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """How many earlier tokens share a token's key [T], and how many have each key [num_keys]."""
    count = torch.bincount(key_T, minlength=num_keys)
    order = torch.argsort(key_T, stable=True)
    start = count.cumsum(0) - count
    place = torch.arange(len(key_T), device=key_T.device)
    rank_T = torch.empty_like(key_T)
    rank_T[order] = place - start[key_T[order]]
    return rank_T, count
