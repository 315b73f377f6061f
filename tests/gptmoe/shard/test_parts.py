"""Who owns what of a served model: everything is held, by as many as the numbers say."""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import LayoutError
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.layout import Layout, divisors
from gptmoe.shard.parts import ExpertSpan, Part, arrange, held, layout_of, stage_ranks, travels

SPEC = ModelSpec(num_layers=6, d_model=24, num_heads=4, d_ff=48, num_experts=(4, 8, 4))
DENSE = ModelSpec(num_layers=6, d_model=24, num_heads=4, d_ff=48)
sizes = st.sampled_from([1, 2, 4])
spans = st.builds(
    lambda layer, first, count: ExpertSpan(layer, first, min(first + count, 4)),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 3),
    st.integers(1, 4),
)


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Numbers that divide."""
    dp, tp, pp = draw(sizes), draw(sizes), draw(st.integers(1, 4))
    expert_ranks = draw(st.integers(0, 4))
    ep = draw(st.sampled_from([d for d in divisors(expert_ranks or dp * tp) if 4 % d == 0]))
    hot = tuple(draw(st.lists(spans, max_size=2)))
    return {"dp": dp, "tp": tp, "pp": pp, "ep": ep, "expert_ranks": expert_ranks, "hot": hot}


def test_two_stages_with_a_rank_of_experts_each() -> None:
    spec = ModelSpec(num_layers=4, d_model=8, num_heads=2, d_ff=8, num_experts=(8, 8))
    first, second = (ExpertSpan(1, 0, 8),), (ExpertSpan(3, 0, 8),)
    assert arrange(spec, dp=2, pp=2, expert_ranks=1) == (
        Part(stage=0, layers=(0, 1), data=0),
        Part(stage=0, layers=(0, 1), data=1),
        Part(stage=1, layers=(2, 3), data=0),
        Part(stage=1, layers=(2, 3), data=1),
        Part(stage=0, layers=(0, 1), experts=first, experts_only=True),
        Part(stage=1, layers=(2, 3), experts=second, experts_only=True),
    )


def test_one_rank_owns_everything() -> None:
    experts = ExpertSpan(1, 0, 4), ExpertSpan(3, 0, 8), ExpertSpan(5, 0, 4)
    assert arrange(SPEC) == (Part(layers=tuple(range(6)), experts=experts),)


def test_experts_are_listed_in_order() -> None:
    part = Part(experts=(ExpertSpan(1, 0, 2), ExpertSpan(3, 4, 5), ExpertSpan(1, 6, 8)))
    assert part.experts_in(1) == (0, 1, 6, 7)
    assert part.experts_in(3) == (4,)
    assert part.experts_in(2) == ()


@given(arguments())
def test_attention_ranks_are_those_of_the_layout(arguments: dict[str, Any]) -> None:
    parts = arrange(SPEC, **arguments)
    dp, tp, pp = (arguments[name] for name in ("dp", "tp", "pp"))
    layout = Layout(dp=dp, tp=tp, pp=pp)
    for rank in range(layout.world):
        part, place = parts[rank], layout.place(rank)
        assert not part.experts_only
        assert (part.stage, part.data, part.slice) == (place.stage, place.data, place.slice)
        assert (part.slices, part.layers) == (tp, layout.layers_of(rank, 6))
    alone = parts[layout.world :]
    assert all(part.experts_only for part in alone)
    assert [(part.stage, part.data) for part in alone] == [
        (stage, index) for stage in range(pp) for index in range(arguments["expert_ranks"])
    ]


@given(arguments())
def test_each_expert_has_as_many_copies_as_the_numbers_say(arguments: dict[str, Any]) -> None:
    parts = arrange(SPEC, **{**arguments, "hot": ()})
    copies = (arguments["expert_ranks"] or arguments["dp"] * arguments["tp"]) // arguments["ep"]
    owners = Counter(
        (layer, expert) for part in parts for layer in range(6) for expert in part.experts_in(layer)
    )
    assert owners == {
        (layer, expert): copies
        for layer, count in zip((1, 3, 5), SPEC.num_experts, strict=True)
        for expert in range(count)
    }
    for part in parts:
        assert {span.layer for span in part.experts} <= set(part.layers)
        assert part.experts_only or not (arguments["expert_ranks"] and part.experts)


@given(arguments())
def test_hot_experts_lie_on_all_that_may_hold_them_and_change_nothing_else(
    arguments: dict[str, Any],
) -> None:
    cold = arrange(SPEC, **{**arguments, "hot": ()})
    for part, plain in zip(arrange(SPEC, **arguments), cold, strict=True):
        for layer in part.layers:
            hot = {
                expert
                for span in arguments["hot"]
                if span.layer == layer and plain.experts
                for expert in range(span.first, span.end)
            }
            assert part.experts_in(layer) == tuple(sorted({*plain.experts_in(layer), *hot}))
        pairs = zip(part.experts, part.experts[1:], strict=False)
        assert all(one.layer < next_.layer or one.end < next_.first for one, next_ in pairs)


@given(arguments())
def test_the_layout_can_be_read_from_the_parts(arguments: dict[str, Any]) -> None:
    parts = arrange(SPEC, **arguments)
    layout = layout_of(parts)
    for name in ("dp", "tp", "pp"):
        assert getattr(layout, name) == arguments[name]
    assert not layout.sequence_parallel
    attention = [part for part in parts if not part.experts_only]
    assert layout.world == len(attention)
    assert [layout.layers_of(rank, 6) for rank in range(layout.world)] == [
        part.layers for part in attention
    ]


@given(arguments())
def test_the_ranks_of_a_stage_hold_all_its_experts(arguments: dict[str, Any]) -> None:
    parts = arrange(SPEC, **arguments)
    stages = stage_ranks(parts)
    assert sorted(rank for ranks in stages for rank in ranks) == list(range(len(parts)))
    for stage, ranks in enumerate(stages):
        assert ranks == sorted(ranks)
        assert {parts[rank].stage for rank in ranks} == {stage}
        for layer in set(parts[ranks[0]].layers) & set(SPEC.moe_layers):
            count = SPEC.experts_in_layer(layer)
            places = held(parts, layer, count)
            assert places == [parts[rank].experts_in(layer) for rank in ranks]
            assert {expert for mine in places for expert in mine} == set(range(count))
            everywhere = all(
                len(parts[rank].experts_in(layer)) == count
                for rank in ranks
                if not parts[rank].experts_only
            )
            assert travels(parts, layer, count) != everywhere


def test_an_expert_that_nobody_holds_is_named() -> None:
    parts = [Part(layers=(0, 1), experts=(ExpertSpan(1, 0, 2), ExpertSpan(1, 3, 4)))]
    assert held(parts, 1, 2) == [(0, 1, 3)]
    with pytest.raises(LayoutError, match="no rank holds expert 2 of layer 1; plan again"):
        held(parts, 1, 4)


@pytest.mark.parametrize(
    ("spec", "numbers", "message"),
    [
        (DENSE, {"expert_ranks": 2}, "expert_ranks=2 needs experts, but the model is dense; use 0"),
        (DENSE, {"dp": 2, "ep": 2}, "ep=2 needs experts, but the model is dense"),
        (SPEC, {"ep": 2, "expert_ranks": 3}, "expert_ranks=3; use 1 or 3"),
        (SPEC, {"ep": 3, "expert_ranks": 3}, "ep=3 must divide num_experts=4; use 1, 2 or 4"),
        (SPEC, {"ep": 8, "expert_ranks": 8}, "ep=8 must divide num_experts=4; use 1, 2 or 4"),
        (SPEC, {"dp": 3, "ep": 3}, "ep=3 must divide num_experts=4; use 1, 2 or 4"),
        (SPEC, {"dp": 2, "ep": 4}, "ep=4 must divide parallel.dp=2; use 1 or 2"),
        (SPEC, {"tp": 3}, "tp=3 must divide model.num_heads=4"),
        (SPEC, {"tp": 3, "expert_ranks": 1}, "tp=3 must divide model.num_heads=4"),
        (SPEC, {"pp": 7, "expert_ranks": 1}, "but model.num_layers=6; use fewer"),
        (SPEC, {"ep": 0, "expert_ranks": 2}, "ep=0 and parallel.expert_ranks=2 must be at least 1"),
        (SPEC, {"expert_ranks": -1}, "ep=1 and parallel.expert_ranks=-1 must be at least 1"),
        (SPEC, {"ep": 0}, "ep=0 must be at least 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    spec: ModelSpec, numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayoutError, match=re.escape(message)):
        arrange(spec, **numbers)


def test_a_dense_model_has_no_experts_to_place() -> None:
    parts = arrange(DENSE, dp=2, pp=2, hot=(ExpertSpan(1, 0, 2),))
    assert not any(part.experts for part in parts)
    assert not travels(parts, 1, 0)
