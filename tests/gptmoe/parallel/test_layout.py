"""gptmoe.parallel.layout: who holds what, and every sentence about layouts that do not divide."""

import re
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import LayoutError
from gptmoe.parallel.layout import Layout, resolve

any_layout = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(
    lambda pair: Layout(dp=pair[0] * pair[1], ep=pair[1])
)


def test_four_ranks_of_which_two_share_experts() -> None:
    layout = Layout(dp=4, ep=2)
    assert layout.world == 4
    assert layout.expert_groups() == [[0, 1], [2, 3]]
    assert layout.replica_groups() == [[0, 2], [1, 3]]
    assert [layout.experts_of(rank, 8) for rank in range(4)] == [(0, 4), (4, 8), (0, 4), (4, 8)]


@given(layout=any_layout)
def test_each_rank_is_in_one_group_of_each_kind(layout: Layout) -> None:
    ranks = list(range(layout.world))
    expert_groups, replica_groups = layout.expert_groups(), layout.replica_groups()
    assert sorted(chain(*expert_groups)) == sorted(chain(*replica_groups)) == ranks
    assert {len(group) for group in expert_groups} == {layout.ep}
    assert {len(group) for group in replica_groups} == {layout.dp // layout.ep}
    for experts in expert_groups:
        for replicas in replica_groups:
            assert len(set(experts) & set(replicas)) == 1


@given(layout=any_layout, share=st.integers(1, 4))
def test_an_expert_group_holds_each_expert_once_and_replicas_hold_the_same(
    layout: Layout, share: int
) -> None:
    num_experts = share * layout.ep
    for group in layout.expert_groups():
        held = [range(*layout.experts_of(rank, num_experts)) for rank in group]
        assert [expert for experts in held for expert in experts] == list(range(num_experts))
    for group in layout.replica_groups():
        assert len({layout.experts_of(rank, num_experts) for rank in group}) == 1


@pytest.mark.parametrize(
    ("dp", "ep", "expected"),
    [
        (None, 1, Layout(dp=1, ep=1)),
        (None, 2, Layout(dp=2, ep=2)),
        (4, 2, Layout(dp=4, ep=2)),
        (3, 1, Layout(dp=3, ep=1)),
    ],
)
def test_dp_not_given_is_the_smallest_that_fits_ep(
    dp: int | None, ep: int, expected: Layout
) -> None:
    assert resolve(dp, ep) == expected


@pytest.mark.parametrize(
    ("dp", "ep", "message"),
    [
        (0, 1, "parallel.dp=0 must be at least 1"),
        (2, 0, "parallel.ep=0 must be at least 1"),
        (None, -2, "parallel.ep=-2 must be at least 1"),
        (2, 4, "parallel.ep=4 must divide parallel.dp=2; use 1 or 2"),
        (6, 4, "parallel.ep=4 must divide parallel.dp=6; use 1, 2, 3 or 6"),
        (1, 2, "parallel.ep=2 must divide parallel.dp=1; use 1"),
    ],
)
def test_layouts_that_do_not_divide(dp: int | None, ep: int, message: str) -> None:
    with pytest.raises(LayoutError, match=f"^{re.escape(message)}$"):
        resolve(dp, ep)


@pytest.mark.parametrize(
    ("ep", "num_experts", "message"),
    [
        (2, (), "parallel.ep=2 needs experts, but the model is dense; use parallel.ep=1"),
        (3, (8, 8), "parallel.ep=3 must divide num_experts=8; use 1, 2, 4 or 8"),
        (4, (4, 6), "parallel.ep=4 must divide num_experts=6; use 1 or 2"),
        (2, (8, 3), "parallel.ep=2 must divide num_experts=3; use 1"),
    ],
)
def test_experts_that_do_not_divide(ep: int, num_experts: tuple[int, ...], message: str) -> None:
    with pytest.raises(LayoutError, match=f"^{re.escape(message)}$"):
        Layout(dp=ep, ep=ep).check_experts(num_experts)


@pytest.mark.parametrize(("ep", "num_experts"), [(1, ()), (1, (3, 5)), (2, (4, 6)), (4, (8, 16))])
def test_experts_that_divide(ep: int, num_experts: tuple[int, ...]) -> None:
    Layout(dp=ep, ep=ep).check_experts(num_experts)
