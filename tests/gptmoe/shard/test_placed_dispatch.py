"""Rows to experts wherever they lie: any placement, any routing, both ways to exchange."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptmoe.model.dispatch import Dispatcher, LocalDispatcher
from gptmoe.model.routing import Routing, Statistics
from gptmoe.model.turns import straight
from gptmoe.shard.dispatch import Exchange, PlacedDispatcher

R = TypeVar("R")
Row = tuple[int, int]
"""(token, expert)"""
MOST_TOKENS = 6
few = settings(max_examples=40)  # each starts threads


@dataclass
class Hub:
    """Where the places of a stage, each in a thread, swap what they have for each other."""

    places: int
    swaps: int = 0
    out: dict[int, Sequence[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.places, timeout=20)

    def swap(self, place: int, parts: Sequence[Tensor]) -> list[Tensor]:
        self.out[place] = parts
        self.swaps += not place
        self.barrier.wait()
        arrived = [self.out[source][place].clone() for source in range(self.places)]
        self.barrier.wait()
        return arrived


class MemoryExchange(Exchange):
    """All-to-all between threads."""

    def __init__(self, hub: Hub, place: int, most_rows: int) -> None:
        super().__init__(None, most_rows)
        self.hub, self.place = hub, place

    def fixed(self, out: Tensor) -> Tensor:
        return torch.cat(self.hub.swap(self.place, out.split(len(out) // self.hub.places)))

    def uneven(self, out: Tensor, receive: list[int], send: list[int]) -> Tensor:
        arrived = self.hub.swap(self.place, out.split(send))
        assert [len(rows) for rows in arrived] == receive
        return torch.cat(arrived)


def on_all(places: int, function: Callable[[int], R]) -> list[R]:
    with ThreadPoolExecutor(places) as pool:
        return list(pool.map(function, range(places)))


@st.composite
def stages(draw: st.DrawFn) -> tuple[list[list[int]], list[list[Row]]]:
    """The experts that each place holds, and the rows of each."""
    places, experts = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    some = st.lists(st.integers(0, places - 1), unique=True, min_size=1, max_size=places)
    owners = [draw(some) for _ in range(experts)]
    held = [[e for e, who in enumerate(owners) if place in who] for place in range(places)]
    row = st.tuples(st.integers(0, MOST_TOKENS - 1), st.integers(0, experts - 1))
    return held, [draw(st.lists(row, unique=True, max_size=12)) for _ in range(places)]


def num_experts(held: Sequence[Sequence[int]]) -> int:
    return 1 + max(expert for mine in held for expert in mine)


def tokens_of(place: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Hidden states that say whose they are."""
    number_T = torch.arange(MOST_TOKENS) + 10 * place
    return torch.stack([number_T, number_T + 100, number_T + 200], 1).to(dtype)


def routing_of(rows: list[Row], num_experts: int) -> Routing:
    return Routing(
        token_R=torch.tensor([token for token, _ in rows], dtype=torch.long),
        expert_R=torch.tensor([expert for _, expert in rows], dtype=torch.long),
        weight_R=torch.arange(1.0, len(rows) + 1),
        num_experts=num_experts,
        losses={},
        count=partial(Statistics.zero, 0),
    )


@dataclass(frozen=True)
class Outcome:
    """What one place saw."""

    arrived: list[tuple[int, int, int]]
    """(source, token, expert) of each row, in order."""
    rows_RD: Tensor
    out_TD: Tensor


def travel(
    held: list[list[int]],
    rows: list[list[Row]],
    *,
    fixed: bool,
    dtype: torch.dtype = torch.float32,
    room: int = 0,
) -> tuple[list[Outcome], int]:
    """Send the rows out, let expert e answer (e + 1) times the row; and how many swaps it took."""
    experts, hub = num_experts(held), Hub(len(held))
    most_rows = room or max(1, *map(len, rows)) if fixed else 0
    device = torch.device("cpu")

    def one(place: int) -> Outcome:
        exchange = MemoryExchange(hub, place, most_rows)
        dispatcher = PlacedDispatcher(exchange, held, experts, place, device)
        routing = routing_of(rows[place], experts)
        sent = straight(dispatcher.dispatch(tokens_of(place, dtype), routing))
        assert len(sent.rows_per_expert) == len(held[place])
        assert sum(sent.rows_per_expert) == len(sent.rows_RD)
        expert_R = torch.tensor(held[place], dtype=torch.long).repeat_interleave(
            torch.tensor(sent.rows_per_expert, dtype=torch.long)
        )
        numbers = zip(sent.rows_RD[:, 0].long().tolist(), expert_R.tolist(), strict=True)
        arrived = [(number // 10, number % 10, expert) for number, expert in numbers]
        answers_RD = sent.rows_RD * (expert_R + 1).unsqueeze(1).to(dtype)
        return Outcome(arrived, sent.rows_RD, straight(dispatcher.combine(answers_RD, sent)))

    return on_all(len(held), one), hub.swaps


def alone(held: list[list[int]], rows: list[Row], place: int) -> Tensor:
    """The sums that one process would have for these tokens."""
    dispatcher: Dispatcher = LocalDispatcher()
    sent = straight(dispatcher.dispatch(tokens_of(place), routing_of(rows, num_experts(held))))
    expert_R = torch.arange(num_experts(held)).repeat_interleave(torch.tensor(sent.rows_per_expert))
    return straight(dispatcher.combine(sent.rows_RD * (expert_R + 1).unsqueeze(1), sent))


@few
@given(stage=stages(), fixed=st.booleans())
def test_each_row_reaches_one_owner_of_its_expert(
    stage: tuple[list[list[int]], list[list[Row]]], fixed: bool
) -> None:
    held, rows = stage
    outcomes, _ = travel(held, rows, fixed=fixed)
    arrived = [row for outcome in outcomes for row in outcome.arrived]
    assert sorted(arrived) == sorted(
        (source, token, expert) for source, mine in enumerate(rows) for token, expert in mine
    )
    for mine, outcome in zip(held, outcomes, strict=True):
        experts = [expert for _, _, expert in outcome.arrived]
        assert set(experts) <= set(mine)
        assert experts == sorted(experts)


@few
@given(stage=stages(), fixed=st.booleans())
def test_the_answers_are_those_of_one_process(
    stage: tuple[list[list[int]], list[list[Row]]], fixed: bool
) -> None:
    held, rows = stage
    outcomes, swaps = travel(held, rows, fixed=fixed)
    assert swaps == (2 if fixed else 3)
    for place, outcome in enumerate(outcomes):
        assert torch.equal(outcome.out_TD, alone(held, rows[place], place))


@few
@given(
    stage=stages(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    more=st.integers(0, 3),
)
def test_both_ways_to_exchange_bring_the_same_rows(
    stage: tuple[list[list[int]], list[list[Row]]], dtype: torch.dtype, more: int
) -> None:
    held, rows = stage
    room = max(1, *map(len, rows)) + more
    uneven, _ = travel(held, rows, fixed=False, dtype=dtype)
    fixed, _ = travel(held, rows, fixed=True, dtype=dtype, room=room)
    for one, other in zip(uneven, fixed, strict=True):
        assert one.arrived == other.arrived
        assert torch.equal(one.rows_RD, other.rows_RD)
        assert one.rows_RD.dtype == other.rows_RD.dtype == dtype
        assert torch.equal(one.out_TD, other.out_TD)


@few
@given(stage=stages())
def test_a_copy_of_ones_own_is_preferred_and_others_share_the_rows_evenly(
    stage: tuple[list[list[int]], list[list[Row]]],
) -> None:
    held, rows = stage
    outcomes, _ = travel(held, rows, fixed=True)
    went = Counter(
        (source, expert, place)
        for place, outcome in enumerate(outcomes)
        for source, _, expert in outcome.arrived
    )
    for source, mine in enumerate(rows):
        for expert in {expert for _, expert in mine}:
            owners = [place for place, experts in enumerate(held) if expert in experts]
            counts = [went[source, expert, place] for place in owners]
            if source in owners:
                assert went[source, expert, source] == sum(counts)
            else:
                assert max(counts) - min(counts) <= 1


def test_single_rows_of_several_sources_go_to_different_copies() -> None:
    held = [[], [], [0], [0]]
    outcomes, _ = travel(held, [[(0, 0)], [(0, 0)], [], []], fixed=True)
    assert [len(outcome.arrived) for outcome in outcomes] == [0, 0, 1, 1]


def test_rows_of_an_expert_arrive_by_source_and_in_their_order() -> None:
    held = [[0], [1]]
    rows = [[(3, 1), (0, 0), (1, 1)], [(5, 1), (2, 0), (4, 0)]]
    outcomes, _ = travel(held, rows, fixed=False)
    assert [outcome.arrived for outcome in outcomes] == [
        [(0, 0, 0), (1, 2, 0), (1, 4, 0)],
        [(0, 3, 1), (0, 1, 1), (1, 5, 1)],
    ]


def test_more_rows_than_there_is_room_for_is_an_error() -> None:
    rows = [[(token, 0) for token in range(3)]] * 2
    with pytest.raises(RuntimeError, match="shape mismatch"):
        travel([[0], [0]], rows, fixed=True, room=2)


def test_an_exchange_counts_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def all_to_all(arrived: Tensor, out: Tensor, *sizes: list[int], group: Any) -> None:
        calls.append((tuple(arrived.shape), sizes))
        arrived.copy_(out)

    monkeypatch.setattr(torch.distributed, "all_to_all_single", all_to_all)
    exchange = Exchange()
    assert exchange.fixed(torch.ones(2, 3)).tolist() == torch.ones(2, 3).tolist()
    assert exchange.uneven(torch.ones(4, 3), [1, 3], [2, 2]).tolist() == torch.ones(4, 3).tolist()
    assert calls == [((2, 3), ()), ((4, 3), ([1, 3], [2, 2]))]
    assert exchange.watch.take() > 0
