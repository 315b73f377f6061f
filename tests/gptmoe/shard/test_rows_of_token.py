"""How many rows of one token may go to one rank: what messages of one size must have room for."""

from typing import Any

import pytest

from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.shard.parts import ExpertSpan, arrange
from gptmoe.shard.shard import most_rows_of_token


@pytest.mark.parametrize(
    ("kind", "placed", "expected"),
    [
        ("switch", {"dp": 2, "ep": 2}, 1),
        ("top2", {"dp": 2, "ep": 2}, 2),
        ("top2", {"dp": 8, "ep": 8}, 2),
        ("expert_choice", {"dp": 2, "ep": 2}, 8),
        ("expert_choice", {"dp": 8, "ep": 8}, 2),
        ("expert_choice", {"dp": 8, "ep": 8, "hot": (ExpertSpan(3, 0, 3),)}, 5),
        ("expert_choice", {"ep": 4, "expert_ranks": 4}, 4),
    ],
)
def test_the_most_that_one_rank_holds_bounds_them(
    kind: Any, placed: dict[str, Any], expected: int
) -> None:
    spec = ModelSpec(
        num_layers=4,
        d_model=16,
        num_heads=2,
        d_ff=32,
        num_experts=(8, 16),
        router=RouterSpec(kind=kind),
    )
    assert most_rows_of_token(spec, arrange(spec, **placed)) == expected
