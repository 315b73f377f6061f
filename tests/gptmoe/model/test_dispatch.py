"""gptmoe.model.dispatch: rows go to their experts and come home, for any routing."""

from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.model.dispatch import LocalDispatcher
from gptmoe.model.routing import Routing, Statistics
from gptmoe.model.turns import straight

Row = tuple[int, int]
NUM_TOKENS, NUM_EXPERTS = 7, 5

any_rows = st.lists(
    st.tuples(st.integers(0, NUM_TOKENS - 1), st.integers(0, NUM_EXPERTS - 1)), unique=True
)
"""(token, expert) pairs: a token may have no row, or one at each expert."""


def make_routing(rows: list[Row]) -> Routing:
    return Routing(
        token_R=torch.tensor([token for token, _ in rows], dtype=torch.long),
        expert_R=torch.tensor([expert for _, expert in rows], dtype=torch.long),
        weight_R=torch.linspace(1, 2, len(rows), dtype=torch.float64),
        num_experts=NUM_EXPERTS,
        losses={},
        count=partial(Statistics.zero, 0),
    )


@given(rows=any_rows)
def test_rows_arrive_sorted_by_expert(rows: list[Row]) -> None:
    h_TD = torch.arange(NUM_TOKENS, dtype=torch.float64).unsqueeze(1)
    sent = straight(LocalDispatcher().dispatch(h_TD, make_routing(rows)))
    assert sent.rows_per_expert == [[e for _, e in rows].count(e) for e in range(NUM_EXPERTS)]
    arrived = torch.split(sent.rows_RD.squeeze(1), sent.rows_per_expert)
    for expert, tokens in enumerate(arrived):
        assert tokens.tolist() == [token for token, e in rows if e == expert]


@given(rows=any_rows)
def test_the_answers_of_a_token_are_weighed_and_summed(rows: list[Row]) -> None:
    h_TD = torch.arange(1, NUM_TOKENS + 1, dtype=torch.float64).unsqueeze(1)
    routing = make_routing(rows)
    dispatcher = LocalDispatcher()
    sent = straight(dispatcher.dispatch(h_TD, routing))
    expert_R = torch.arange(NUM_EXPERTS).repeat_interleave(torch.tensor(sent.rows_per_expert))
    out_TD = straight(dispatcher.combine(sent.rows_RD * 10.0 ** expert_R.unsqueeze(1), sent))
    expected = [0.0] * NUM_TOKENS
    for (token, expert), weight in zip(rows, routing.weight_R.tolist(), strict=True):
        expected[token] += weight * (token + 1) * 10.0**expert
    torch.testing.assert_close(out_TD.squeeze(1), torch.tensor(expected, dtype=torch.float64))


def test_narrow_rows_are_weighed_in_the_precision_of_the_weights() -> None:
    routing = make_routing([(0, 0), (1, 1)])
    dispatcher = LocalDispatcher()
    sent = straight(dispatcher.dispatch(torch.ones(2, 3, dtype=torch.bfloat16), routing))
    out_TD = straight(dispatcher.combine(sent.rows_RD, sent))
    assert out_TD.dtype == torch.bfloat16
    assert out_TD[:, 0].tolist() == [1.0, 2.0]
