"""Rows to experts wherever they lie: on ranks of their own, and on several at once.

Letters: T tokens, D model width, S rows at their source, R rows at the experts, E experts of a
layer, P ranks (places) of a stage, L experts that one rank holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from gptmoe.model.dispatch import Sent, weighted_sum
from gptmoe.model.routing import Routing, rank_within
from gptmoe.model.turns import Pausing
from gptmoe.parallel.expert import Stopwatch


@dataclass(slots=True)
class Exchange:
    """How the ranks of a stage exchange rows in the step under way; shared by its layers.

    With `most_rows` above 0 every rank sends every other a message of one size, with room for that
    many rows behind their counts: one collective there and one back. With 0 the counts go first.
    """

    group: dist.ProcessGroup | None = None
    most_rows: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch)

    def fixed(self, out: Tensor) -> Tensor:
        """All-to-all of P equal parts, one after the other along dimension 0."""
        arrived = torch.empty_like(out)
        with self.watch.running():
            dist.all_to_all_single(arrived, out, group=self.group)
        return arrived

    def uneven(self, out: Tensor, receive: list[int], send: list[int]) -> Tensor:
        """All-to-all of rows, so many to and from each rank."""
        arrived = out.new_empty(sum(receive), *out.shape[1:])
        with self.watch.running():
            dist.all_to_all_single(arrived, out.contiguous(), receive, send, group=self.group)
        return arrived


@dataclass(frozen=True, slots=True)
class _RouteBack:
    sent_P: list[int]
    received_P: list[int]
    by_expert_R: Tensor
    """Order that sorted the arrived rows by local expert."""
    by_all_S: Tensor
    """Order that sorts the rows at home by expert: sums are then the same wherever experts lie."""
    place_S: Tensor | None = None
    """Where each row lies in the messages of one size."""


class PlacedDispatcher:
    """A layer whose experts lie on the ranks of a stage: place p holds `held[p]`. Collective.

    A row goes to this rank's own copy of its expert; else to one of its owners, between which the
    rows of an expert are split evenly. Without gradients.
    """

    def __init__(
        self,
        exchange: Exchange,
        held: Sequence[Sequence[int]],
        num_experts: int,
        place: int,
        device: torch.device,
    ) -> None:
        self._exchange = exchange
        self._held = held
        self._place = place
        self._most_held = max(map(len, held))
        owners = [[p for p, mine in enumerate(held) if e in mine] for e in range(num_experts)]
        chosen = [[place] if place in who else who for who in owners]
        most = max(map(len, chosen))
        self._choices_E = torch.tensor([len(who) for who in chosen], device=device)
        self._owner_EC = torch.tensor([(who * most)[:most] for who in chosen], device=device)
        local = [[mine.index(e) if e in mine else 0 for e in range(num_experts)] for mine in held]
        self._local_PE = torch.tensor(local, device=device)

    def dispatch(self, h_TD: Tensor, routing: Routing) -> Pausing[Sent]:
        """Send each row to an owner of its expert; what arrives is sorted by local expert."""
        yield from ()
        owner_S, local_S = self._destinations(routing.expert_R)
        key_S = owner_S * self._most_held + local_S
        order_S = torch.argsort(key_S, stable=True)
        cells = len(self._held) * self._most_held
        counts_PL = torch.bincount(key_S, minlength=cells).view(len(self._held), -1)
        token_S = routing.token_R[order_S]
        by_all_S = torch.argsort(routing.expert_R[order_S], stable=True)
        if self._exchange.most_rows:
            arrived = self._send_fixed(h_TD[token_S], counts_PL)
        else:
            arrived = self._send_uneven(h_TD[token_S], counts_PL)
        rows_RD, counts_in_PL, sent_P, place_S = arrived
        by_expert_R = _sort_sources(counts_in_PL)
        per_expert = counts_in_PL.sum(0).tolist()[: len(self._held[self._place])]
        return Sent(
            rows_RD=rows_RD[by_expert_R],
            rows_per_expert=per_expert,
            token_S=token_S[by_all_S],
            weight_S=routing.weight_R[order_S][by_all_S],
            num_tokens=len(h_TD),
            route_back=_RouteBack(
                sent_P, counts_in_PL.sum(1).tolist(), by_expert_R, by_all_S, place_S
            ),
        )

    def combine(self, rows_RD: Tensor, sent: Sent) -> Pausing[Tensor]:
        """Return the answers to the ranks of their tokens and sum them there."""
        yield from ()
        route = sent.route_back
        assert isinstance(route, _RouteBack)
        unsorted_RD = torch.empty_like(rows_RD).index_copy(0, route.by_expert_R, rows_RD)
        if route.place_S is None:
            home_SD = self._exchange.uneven(unsorted_RD, route.sent_P, route.received_P)
        else:
            home_SD = self._return_fixed(unsorted_RD, route)
        return weighted_sum(home_SD[route.by_all_S], sent)

    def _destinations(self, expert_S: Tensor) -> tuple[Tensor, Tensor]:
        """The place that each row goes to, and its expert's number there."""
        choice_S = torch.zeros_like(expert_S)
        if self._owner_EC.shape[1] > 1:
            rank_S, _ = rank_within(expert_S, len(self._choices_E))
            choice_S = (rank_S + self._place) % self._choices_E[expert_S]
        owner_S = self._owner_EC[expert_S, choice_S]
        return owner_S, self._local_PE[owner_S, expert_S]

    def _send_uneven(
        self, rows_SD: Tensor, counts_PL: Tensor
    ) -> tuple[Tensor, Tensor, list[int], Tensor | None]:
        counts_in_PL = self._exchange.fixed(counts_PL)
        sent, received = counts_PL.sum(1).tolist(), counts_in_PL.sum(1).tolist()
        return self._exchange.uneven(rows_SD, received, sent), counts_in_PL, sent, None

    def _send_fixed(
        self, rows_SD: Tensor, counts_PL: Tensor
    ) -> tuple[Tensor, Tensor, list[int], Tensor | None]:
        """Counts and rows in one message of the same size to each place."""
        places, room = len(self._held), self._exchange.most_rows
        sent_P = counts_PL.sum(1)
        place_S = _slots(sent_P, room)
        width = rows_SD.shape[1] * rows_SD.element_size()
        head = counts_PL.shape[1] * 4
        out = rows_SD.new_zeros(places, head + room * width, dtype=torch.uint8)
        out[:, :head] = counts_PL.int().view(torch.uint8)
        body = rows_SD.new_zeros(places * room, rows_SD.shape[1])
        body[place_S] = rows_SD
        out[:, head:] = body.view(torch.uint8).view(places, -1)
        arrived = self._exchange.fixed(out)
        counts_in_PL = arrived[:, :head].contiguous().view(torch.int32).long()
        bodies = arrived[:, head:].contiguous().view(rows_SD.dtype).view(places * room, -1)
        return bodies[_slots(counts_in_PL.sum(1), room)], counts_in_PL, sent_P.tolist(), place_S

    def _return_fixed(self, rows_RD: Tensor, route: _RouteBack) -> Tensor:
        places, room = len(self._held), self._exchange.most_rows
        out = rows_RD.new_zeros(places * room, rows_RD.shape[1])
        out[_slots(route.by_expert_R.new_tensor(route.received_P), room)] = rows_RD
        return self._exchange.fixed(out)[route.place_S]


def _slots(count_P: Tensor, room: int) -> Tensor:
    """Row numbers in [P * room] of the first count_P rows of each part."""
    filled_PR = torch.arange(room, device=count_P.device) < count_P.unsqueeze(1)
    return filled_PR.flatten().nonzero().squeeze(1)


def _sort_sources(counts_PL: Tensor) -> Tensor:
    """Rows arrive by (source, local expert); the order that sorts them by (expert, source)."""
    sources, experts = counts_PL.shape
    expert_of_block = torch.arange(experts, device=counts_PL.device).repeat(sources)
    return torch.argsort(expert_of_block.repeat_interleave(counts_PL.flatten()), stable=True)
