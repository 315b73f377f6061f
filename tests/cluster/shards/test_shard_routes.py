"""Where steps and hidden states go: from the engine through the stages, and back to it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.shards.routes import Route, entries, exits, route_of
from gptmoe.model.spec import ModelSpec
from gptmoe.shard.parts import arrange

SPEC = ModelSpec(num_layers=4, d_model=8, num_heads=4, d_ff=8, num_experts=(4, 4))


@pytest.mark.parametrize(
    ("layout", "first", "last"),
    [
        ({}, [0], [0]),
        ({"dp": 2, "tp": 2}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"dp": 2, "pp": 2}, [0, 1], [2, 3]),
        ({"dp": 2, "expert_ranks": 2}, [0, 1, 2, 3], [0, 1]),
        ({"pp": 2, "expert_ranks": 1}, [0, 2, 3], [1]),
    ],
)
def test_the_engine_tells_first_stages_and_experts_and_hears_last_stages(
    layout: dict[str, Any], first: list[int], last: list[int]
) -> None:
    parts = arrange(SPEC, **layout)
    assert entries(parts) == first
    assert exits(parts) == last


def test_a_pipeline_with_slices_and_ranks_of_experts_alone() -> None:
    parts = arrange(SPEC, dp=2, tp=2, pp=2, expert_ranks=1)
    engine = len(parts)
    assert [route_of(parts, rank) for rank in (0, 3, 5, 6)] == [
        Route(engine, 4),
        Route(engine, 7),
        Route(1, engine),
        Route(2, engine),
    ]
    assert route_of(parts, 8) == route_of(parts, 9) == Route(engine, engine)


sizes = st.sampled_from([1, 2, 4])


@given(dp=sizes, tp=sizes, pp=sizes, expert_ranks=st.integers(0, 2))
def test_each_way_leads_through_all_stages_of_the_same_samples_and_slice(
    dp: int, tp: int, pp: int, expert_ranks: int
) -> None:
    parts = arrange(SPEC, dp=dp, tp=tp, pp=pp, expert_ranks=expert_ranks)
    engine, ends, passed = len(parts), [], []
    for entry in entries(parts):
        rank, way = entry, []
        while rank != engine:
            way.append(rank)
            target = route_of(parts, rank).target
            assert target == engine or route_of(parts, target).source == rank
            rank = target
        passed += way
        if not parts[entry].experts_only:
            ends.append(way[-1])
            assert [parts[rank].stage for rank in way] == list(range(pp))
            assert len({(parts[rank].data, parts[rank].slice) for rank in way}) == 1
    assert sorted(passed) == list(range(engine))
    assert ends == exits(parts)
