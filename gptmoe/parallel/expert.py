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
from gptmoe.model.turns import Pausing


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

    def dispatch(self, h_TD: Tensor, routing: Routing) -> Pausing[Sent]:
        """Send each row to the owner of its expert; what arrives is sorted by local expert."""
        order_S, rows_E = sort_by_expert(routing)
        token_S = routing.token_R[order_S]
        counts_out = rows_E.view(self.size, -1)
        counts_in = torch.empty_like(counts_out)
        with self.watch.running():
            dist.all_to_all_single(counts_in, counts_out, group=self.group)
        sent, received = counts_out.sum(1).tolist(), counts_in.sum(1).tolist()
        arrived_RD = yield from exchange(h_TD[token_S], received, sent, self.group, self.watch)
        by_expert_R = _sort_sources(counts_in)
        return Sent(
            rows_RD=arrived_RD[by_expert_R],
            rows_per_expert=counts_in.sum(0).tolist(),
            token_S=token_S,
            weight_S=routing.weight_R[order_S],
            num_tokens=len(h_TD),
            route_back=_RouteBack(sent, received, by_expert_R),
        )

    def combine(self, rows_RD: Tensor, sent: Sent) -> Pausing[Tensor]:
        """Return the answers to the ranks of their tokens and sum them there."""
        route = sent.route_back
        assert isinstance(route, _RouteBack)
        unsorted_RD = torch.empty_like(rows_RD).index_copy(0, route.by_expert_R, rows_RD)
        splits = route.sent_per_rank, route.received_per_rank
        home_SD = yield from exchange(unsorted_RD, *splits, self.group, self.watch)
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
) -> Pausing[Tensor]:
    """All-to-all of rows with uneven splits; its gradient is the reverse exchange.

    It pauses between sending and waiting, and so does its gradient: the nodes of whatever ran in
    the pause lie between those of the two halves, and run between them on the way back.
    """
    travel = _Travel(receive, send, group, watch)
    under_way: Tensor = _Depart.apply(rows, travel)  # type: ignore[no-untyped-call]
    yield
    arrived: Tensor = _Arrive.apply(under_way, travel)  # type: ignore[no-untyped-call]
    return arrived


class _Travel:
    """One exchange there and, for its gradient, back."""

    def __init__(
        self, receive: list[int], send: list[int], group: dist.ProcessGroup, watch: Stopwatch
    ) -> None:
        self._receive, self._send, self._group = receive, send, group
        self._watch = watch
        self._under_way: Any = None

    def there(self, rows: Tensor) -> Tensor:
        """Start; the result is not to be read before `wait`."""
        return self._start(rows, self._receive, self._send)

    def back(self, rows: Tensor) -> Tensor:
        """Start the reverse."""
        return self._start(rows, self._send, self._receive)

    def wait(self) -> Tensor:
        """Until what was started has arrived."""
        work, out, _ = self._under_way
        with self._watch.running():
            work.wait()
        self._under_way = None
        return out

    def _start(self, rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        # A non-contiguous input would be read in memory order, silently permuting the data.
        rows = rows.contiguous()
        with self._watch.running():
            work = dist.all_to_all_single(
                out, rows, receive, send, group=self._group, async_op=True
            )
        self._under_way = work, out, rows
        return out


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        return travel.there(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.travel.wait(), None  # _Arrive has started it


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        return travel.wait().view_as(under_way)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.travel.back(gradients[0])
        return gradients[0], None  # of the right shape, and not read: see _Depart


def _sort_sources(counts_in: Tensor) -> Tensor:
    """Rows arrive by (source rank, local expert); the order that sorts them by (expert, source)."""
    sources, experts = counts_in.shape
    expert_of_block = torch.arange(experts, device=counts_in.device).repeat(sources)
    return torch.argsort(expert_of_block.repeat_interleave(counts_in.flatten()), stable=True)
