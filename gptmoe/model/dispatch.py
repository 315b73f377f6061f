"""The dispatcher's contract, and the one for experts that live in this process.

`dispatch` moves rows to their experts, `combine` brings the answers home. Other implementations
(all-to-all over a process group) keep the same contract, so the layer does not know where experts
live.
Letters: T tokens, D model width, R rows at the experts, S rows at their source.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from .routing import Routing
from .turns import Pausing


@dataclass(frozen=True, slots=True)
class Sent:
    """Rows at their experts, and what `combine` needs to bring them home."""

    rows_RD: Tensor
    """Sorted by local expert."""
    rows_per_expert: list[int]
    """How many of the rows belong to each local expert; the numbers add up to R, which may be 0."""
    token_S: Tensor
    """The token of each row at its source, in the order sent."""
    weight_S: Tensor
    num_tokens: int
    route_back: object = None
    """Private to the dispatcher that made it."""


class Dispatcher(Protocol):
    """Takes rows to experts and back. Both pause while rows travel, if they do."""

    def dispatch(self, h_TD: Tensor, routing: Routing) -> Pausing[Sent]:
        """Send the rows of `routing` to their experts."""
        ...

    def combine(self, rows_RD: Tensor, sent: Sent) -> Pausing[Tensor]:
        """Sum the weighted answers of each token, [T, D]; zero for a token without rows."""
        ...


class LocalDispatcher:
    """All experts of the layer are in this process: dispatching is sorting."""

    def dispatch(self, h_TD: Tensor, routing: Routing) -> Pausing[Sent]:
        """Sort the rows by expert."""
        yield from ()
        if routing.expert_R.shape == (1,):  # a step of one sequence: nothing to sort
            one = [0] * routing.num_experts
            one[int(routing.expert_R)] = 1
            token_S = routing.token_R
            rows_SD = h_TD if len(h_TD) == 1 else h_TD[token_S]
            return Sent(rows_SD, one, token_S, routing.weight_R, len(h_TD))
        order_S, rows_E = sort_by_expert(routing)
        token_S = routing.token_R[order_S]
        return Sent(
            rows_RD=h_TD[token_S],
            rows_per_expert=rows_E.tolist(),
            token_S=token_S,
            weight_S=routing.weight_R[order_S],
            num_tokens=len(h_TD),
        )

    def combine(self, rows_RD: Tensor, sent: Sent) -> Pausing[Tensor]:
        """Weigh the rows and add them to their tokens."""
        yield from ()
        return weighted_sum(rows_RD, sent)

    def count(self, rows: Iterable[tuple[int, int]]) -> None:
        """Nothing: nobody wants to know."""


class CountedDispatcher:
    """Another dispatcher, with the rows counted that each expert here gets."""

    def __init__(self, inner: Dispatcher, load: list[int], experts: Sequence[int]) -> None:
        """`load` is added to, at the place of each of the `experts` that are here, in order."""
        self._inner, self._load, self._experts = inner, load, experts

    def dispatch(self, h_TD: Tensor, routing: Routing) -> Pausing[Sent]:
        """As the other's."""
        sent = yield from self._inner.dispatch(h_TD, routing)
        for expert, rows in zip(self._experts, sent.rows_per_expert, strict=True):
            self._load[expert] += rows
        return sent

    def combine(self, rows_RD: Tensor, sent: Sent) -> Pausing[Tensor]:
        """As the other's."""
        return (yield from self._inner.combine(rows_RD, sent))

    @property
    def is_local(self) -> bool:
        """Whether the other is."""
        return type(self._inner) is LocalDispatcher

    def count(self, rows: Iterable[tuple[int, int]]) -> None:
        """Count rows that were computed without `dispatch`: local experts, and how many each."""
        for expert, number in rows:
            self._load[self._experts[expert]] += number


def is_local(dispatcher: Dispatcher) -> TypeGuard[LocalDispatcher | CountedDispatcher]:
    """Whether all experts are in this process: who can may compute them without `dispatch`, and
    tells `count` so."""
    if isinstance(dispatcher, CountedDispatcher):
        return dispatcher.is_local
    return type(dispatcher) is LocalDispatcher


def sort_by_expert(routing: Routing) -> tuple[Tensor, Tensor]:
    """The order that sorts rows by expert, stable, and the number of rows of each expert [E]."""
    order_S = torch.argsort(routing.expert_R, stable=True)
    return order_S, torch.bincount(routing.expert_R, minlength=routing.num_experts)


def weighted_sum(rows_SD: Tensor, sent: Sent) -> Tensor:
    """Sum of weight * row over the rows of each token, weighed in the weights' precision. [T, D]"""
    weighted_SD = (rows_SD * sent.weight_S.unsqueeze(-1)).to(rows_SD.dtype)
    if len(weighted_SD) == sent.num_tokens == 1:  # a step of one sequence: nothing to add
        return weighted_SD
    out_TD = rows_SD.new_zeros(sent.num_tokens, rows_SD.shape[-1])
    return out_TD.index_add(0, sent.token_S, weighted_SD)
