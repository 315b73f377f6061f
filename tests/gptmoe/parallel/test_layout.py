"""gptmoe.parallel.layout: who holds what, and every sentence about layouts that do not divide."""

import re
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import LayoutError
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.layout import Layout, divisors, smallest_dp

SPEC = ModelSpec(num_layers=6, d_model=24, num_heads=4, d_ff=48, num_experts=(4, 4, 4))
sizes = st.integers(1, 4)


@st.composite
def any_layout(draw: st.DrawFn) -> Layout:
    dp, tp, pp, cut = draw(sizes), draw(sizes), draw(sizes), draw(st.booleans())
    ep = draw(st.sampled_from(divisors(dp if cut else dp * tp)))
    return Layout(dp=dp, tp=tp, pp=pp, ep=ep, expert_tp=cut)


def test_eight_ranks() -> None:
    layout = Layout(dp=2, tp=2, pp=2, ep=2)
    assert layout.world == 8
    assert [layout.place(5).stage, layout.place(5).data, layout.place(5).slice] == [1, 0, 1]
    assert layout.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.data_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.pipelines() == [[0, 4], [1, 5], [2, 6], [3, 7]] == layout.tied_groups()
    assert layout.expert_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.replica_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    cut = Layout(dp=2, tp=2, pp=2, ep=2, expert_tp=True)
    assert cut.expert_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert cut.replica_groups() == [[rank] for rank in range(8)]
    assert [Layout(dp=4, ep=2).experts_of(rank, 8)[0] for rank in range(4)] == [0, 4, 0, 4]


@given(layout=any_layout())
def test_each_rank_is_in_one_group_of_each_kind(layout: Layout) -> None:
    ranks = list(range(layout.world))
    kinds = {
        "expert": (layout.expert_groups(), layout.ep),
        "replica": (layout.replica_groups(), layout.expert_span // layout.ep),
        "tensor": (layout.tensor_groups(), layout.tp),
        "data": (layout.data_groups(), layout.dp),
        "pipeline": (layout.pipelines(), layout.pp),
    }
    for groups, size in kinds.values():
        assert sorted(chain(*groups)) == ranks
        assert {len(group) for group in groups} == {size}
    for experts in layout.expert_groups():
        for replicas in layout.replica_groups():
            assert len(set(experts) & set(replicas)) <= 1


@given(layout=any_layout(), share=st.integers(1, 4))
def test_an_expert_group_holds_each_expert_once_and_replicas_hold_the_same(
    layout: Layout, share: int
) -> None:
    num_experts = share * layout.ep
    for group in layout.expert_groups():
        held = [range(*layout.experts_of(rank, num_experts)) for rank in group]
        assert [expert for experts in held for expert in experts] == list(range(num_experts))
    for group in layout.replica_groups():
        assert len({layout.experts_of(rank, num_experts) for rank in group}) == 1


@given(layers=st.integers(8, 40), pp=sizes, chunks=st.integers(1, 2))
def test_chunks_hold_each_layer_once_and_differ_by_one_at_most(
    layers: int, pp: int, chunks: int
) -> None:
    layout = Layout(pp=pp, chunks=chunks)
    parts = layout.layer_chunks(layers)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    held = [layout.layers_of(rank, layers) for rank in range(layout.world)]
    assert sorted(chain(*held)) == list(range(layers))
    for rank, mine in enumerate(held):
        assert {layout.stage_of(layer, layers) for layer in mine} == {rank}


def test_layers_may_be_dealt_out_by_hand() -> None:
    layout = Layout(pp=2, chunks=2, chunk_layers=(1, 2, 1, 2))
    assert layout.layers_of(0, 6) == (0, 3)
    assert layout.layers_of(1, 6) == (1, 2, 4, 5)


@pytest.mark.parametrize(
    ("ep", "tp", "expert_tp", "expected"),
    [
        (1, 1, False, 1),
        (2, 1, False, 2),
        (4, 2, False, 2),
        (2, 4, False, 1),
        (6, 4, False, 3),
        (4, 2, True, 4),
    ],
)
def test_the_smallest_dp_that_fits_ep(ep: int, tp: int, expert_tp: bool, expected: int) -> None:
    assert smallest_dp(ep, tp, expert_tp=expert_tp) == expected
    Layout(dp=expected, tp=tp, ep=ep, expert_tp=expert_tp)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dp": 0}, "parallel.dp=0 must be at least 1"),
        ({"dp": smallest_dp(-2), "ep": -2}, "parallel.ep=-2 must be at least 1"),
        ({"tp": -1}, "parallel.tp=-1 must be at least 1"),
        ({"pp": 0}, "parallel.pp=0 must be at least 1"),
        ({"chunks": 0}, "parallel.chunks=0 must be at least 1"),
        ({"dp": 2, "ep": 4}, "parallel.ep=4 must divide parallel.dp=2; use 1 or 2"),
        ({"dp": 6, "ep": 4}, "parallel.ep=4 must divide parallel.dp=6; use 1, 2, 3 or 6"),
        ({"dp": 1, "ep": 2}, "parallel.ep=2 must divide parallel.dp=1; use 1"),
        (
            {"dp": 2, "tp": 3, "ep": 4},
            "parallel.ep=4 must divide parallel.dp x parallel.tp=6; use 1, 2, 3 or 6",
        ),
        (
            {"dp": 2, "tp": 2, "ep": 4, "expert_tp": True},
            "parallel.ep=4 must divide parallel.dp=2; use 1 or 2",
        ),
    ],
)
def test_layouts_that_do_not_divide(given: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError, match=f"^{re.escape(message)}$"):
        Layout(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=3), "parallel.tp=3 must divide model.num_heads=4; use 1, 2 or 4"),
        (
            Layout(pp=4, chunks=2),
            "parallel.pp=4 x parallel.chunks=2 need as many layers, but model.num_layers=6; "
            "use fewer",
        ),
        (
            Layout(chunks=2),
            "parallel.chunks=2 cuts pipeline stages further, but parallel.pp=1; "
            "use parallel.chunks=1",
        ),
        (
            Layout(pp=2, chunk_layers=(3, 2)),
            "parallel.chunk_layers=[3, 2] must be 2 numbers above 0 (pp x chunks) that add up to "
            "model.num_layers=6",
        ),
        (Layout(dp=3, ep=3), "parallel.ep=3 must divide num_experts=4; use 1, 2 or 4"),
    ],
    ids=str,
)
def test_models_that_do_not_divide(layout: Layout, message: str) -> None:
    with pytest.raises(LayoutError, match=f"^{re.escape(message)}$"):
        layout.check_model(SPEC)


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
