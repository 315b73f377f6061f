"""The router's contract: which token goes to which expert, with what weight, and what it cost.

Letters: T tokens, D model width, E experts, G groups, R rows (copies of tokens on their way to an
expert).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .jitter import Jitter
from .layers import linear, wide
from .spec import RouterSpec


@dataclass(frozen=True, slots=True)
class Groups:
    """T tokens as G equal groups in order; padding (`valid_T` False) is not routed or counted."""

    tokens_per_group: int
    valid_T: Tensor | None = None
    jitter: Jitter | None = None
    """Where the noise of routers that have some comes from; None = no noise."""

    def mask(self, like_T: Tensor) -> Tensor:
        """True on tokens that are no padding, [T]."""
        if self.valid_T is not None:
            return self.valid_T
        return torch.ones(len(like_T), dtype=torch.bool, device=like_T.device)

    def in_layer(self, layer: int) -> "Groups":
        """The same with the noise of that layer."""
        if self.jitter is None:
            return self
        return dataclasses.replace(self, jitter=dataclasses.replace(self.jitter, layer=layer))


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of one routing, detached; they add up over microbatches, layers' ranks and steps."""

    load_E: Tensor
    """Rows that each expert was chosen for, before dropping."""
    dropped: Tensor
    """Rows that found their expert full."""
    tokens: Tensor
    """Tokens routed."""
    entropy: Tensor
    """Sum over tokens of the entropy of the router's distribution, in nats."""
    unrouted: Tensor
    """Tokens that no expert took."""
    cutoff_E: Tensor
    """Sum over groups of the lowest score that each expert took, float64; zeros where experts do
    not choose."""
    groups: Tensor
    """Groups in that sum."""

    @classmethod
    def zero(cls, num_experts: int) -> "Statistics":
        """Of no tokens."""
        none, none_E = torch.zeros((), dtype=torch.long), torch.zeros(num_experts, dtype=torch.long)
        return cls(none_E, none, none, none.double(), none, none_E.double(), none)

    def __add__(self, other: "Statistics") -> "Statistics":
        names = [field.name for field in dataclasses.fields(self)]
        return Statistics(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True, slots=True)
class Routing:
    """Row r carries token `token_R[r]` to expert `expert_R[r]` and comes back times `weight_R[r]`.

    A token may have 0 to E rows. `losses` hold sums over the groups, unweighted, in at least
    float32, under the names of RouterSpec.loss_coefficients.
    """

    token_R: Tensor
    expert_R: Tensor
    weight_R: Tensor
    num_experts: int
    losses: dict[str, Tensor]
    count: Callable[[], Statistics]
    preference_T: Tensor | None = None
    """Each token's largest preference for an expert, where the layer wants it; else None."""

    @property
    def statistics(self) -> Statistics:
        """Counted when asked for: generation does not ask."""
        return self.count()


class Router(Protocol):
    """Chooses experts. `route` writes no buffer: it may run again for recompute.

    A router's state are its buffers, which begin as zeros; only `update` changes them. They are
    stored with the weights and are whole on every rank that holds the layer.
    """

    def route(self, h_TD: Tensor, groups: Groups) -> Routing:
        """Decide for all tokens; capacity and balance losses are computed within each group."""
        ...

    def update(self, statistics: Statistics) -> None:
        """Learn from one optimizer step's statistics of the whole global batch."""
        ...


class LinearRouter(nn.Module):
    """What the routers share: a score of each expert for each token by one matrix, [E, D]."""

    def __init__(self, d_model: int, num_experts: int, spec: RouterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.weight)

    def seen(self, h_TD: Tensor, groups: Groups) -> Tensor:
        """What the router sees of h: in at least float32; in training with `spec.jitter`."""
        h_TD = h_TD.to(wide(h_TD.dtype))
        if self.training and self.spec.jitter and groups.jitter is not None:
            h_TD = groups.jitter(h_TD, self.spec.jitter)
        return h_TD

    def logits(self, h_TD: Tensor, groups: Groups) -> Tensor:
        """The scores, [T, E]."""
        return linear(self.seen(h_TD, groups), self.weight)

    def route(self, h_TD: Tensor, groups: Groups) -> Routing:
        """See Router.route."""
        raise NotImplementedError

    def update(self, statistics: Statistics) -> None:
        """Nothing: a router without state."""


def rank_within(key_T: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """How many earlier tokens share a token's key [T], and how many have each key [num_keys]."""
    count = torch.bincount(key_T, minlength=num_keys)
    order = torch.argsort(key_T, stable=True)
    start = count.cumsum(0) - count
    place = torch.arange(len(key_T), device=key_T.device)
    rank_T = torch.empty_like(key_T)
    rank_T[order] = place - start[key_T[order]]
    return rank_T, count
