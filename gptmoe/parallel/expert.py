"""Expert parallelism: rows travel to the ranks that own their experts by all-to-all, and back.

Letters: T tokens, D model width, S rows at their source, R rows at the experts, E all experts.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptmoe.model.dispatch import Sent, sort_by_expert, weighted_sum
from gptmoe.model.routing import Routing


@dataclass(frozen=True, slots=True)
class _RouteBack:
    sent_per_rank: list[int]
    received_per_rank: list[int]
    by_expert_R: Tensor
    """Order that sorted the received rows by local expert."""


class AllToAllDispatcher:
    """Experts split evenly over a group of `size` ranks, in rank order. Collective: all ranks call.

    A rank without rows still takes part forward and backward: its empty tensors stay in the graph.
    """

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self.group = group
        self.size = size
        self.watch = Stopwatch()

    def dispatch(self, h_TD: Tensor, routing: Routing) -> Sent:
        """Send each row to the owner of its expert; what arrives is sorted by local expert."""
        order_S, rows_E = sort_by_expert(routing)
        token_S = routing.token_R[order_S]
        counts_out = rows_E.view(self.size, -1)
        counts_in = torch.empty_like(counts_out)
        with self.watch.running():
            dist.all_to_all_single(counts_in, counts_out, group=self.group)
        sent, received = counts_out.sum(1).tolist(), counts_in.sum(1).tolist()
        arrived_RD = exchange(h_TD[token_S], received, sent, self.group, self.watch)
        by_expert_R = _sort_sources(counts_in)
        return Sent(
            rows_RD=arrived_RD[by_expert_R],
            rows_per_expert=counts_in.sum(0).tolist(),
            token_S=token_S,
            weight_S=routing.weight_R[order_S],
            num_tokens=len(h_TD),
            route_back=_RouteBack(sent, received, by_expert_R),
        )

    def combine(self, rows_RD: Tensor, sent: Sent) -> Tensor:
        """Return the answers to the ranks of their tokens and sum them there."""
        route = sent.route_back
        assert isinstance(route, _RouteBack)
        unsorted_RD = torch.empty_like(rows_RD).index_copy(0, route.by_expert_R, rows_RD)
        splits = route.sent_per_rank, route.received_per_rank
        home_SD = exchange(unsorted_RD, *splits, self.group, self.watch)
        return weighted_sum(home_SD, sent)


class Stopwatch:
    """Seconds that this rank has spent in exchanges; on CUDA those of starting them only."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of a block."""
        began_s = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began_s

    def take(self) -> float:
        """The seconds since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def exchange(
    rows: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup, watch: Stopwatch
) -> Tensor:
    """All-to-all of rows with uneven splits; its gradient is the reverse exchange."""
    result: Tensor = _Exchange.apply(  # type: ignore[no-untyped-call]
        rows, receive, send, group, watch
    )
    return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, receive: list[int], send: list[int], group: Any, watch: Stopwatch
    ) -> Tensor:
        ctx.splits, ctx.group, ctx.watch = (receive, send), group, watch
        with watch.running():
            return _all_to_all(rows, receive, send, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        receive, send = ctx.splits
        with ctx.watch.running():
            back = _all_to_all(gradients[0], send, receive, ctx.group)
        return back, None, None, None, None


def _all_to_all(rows: Tensor, receive: list[int], send: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    # A non-contiguous input would be read in memory order, silently permuting the data.
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


def _sort_sources(counts_in: Tensor) -> Tensor:
    """Rows arrive by (source rank, local expert); the order that sorts them by (expert, source)."""
    sources, experts = counts_in.shape
    expert_of_block = torch.arange(experts, device=counts_in.device).repeat(sources)
    return torch.argsort(expert_of_block.repeat_interleave(counts_in.flatten()), stable=True)
