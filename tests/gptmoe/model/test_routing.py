"""gptmoe.model.routing: places within a group, and statistics that add up."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.model.routing import Statistics, rank_within


@given(keys=st.lists(st.integers(0, 4), max_size=30))
def test_rank_within_counts_the_earlier_tokens_of_the_same_key(keys: list[int]) -> None:
    rank_T, count = rank_within(torch.tensor(keys, dtype=torch.long), 5)
    assert rank_T.tolist() == [keys[:place].count(key) for place, key in enumerate(keys)]
    assert count.tolist() == [keys.count(key) for key in range(5)]


def test_statistics_add_up() -> None:
    one = Statistics(
        load_E=torch.tensor([1, 2]),
        dropped=torch.tensor(1),
        tokens=torch.tensor(3),
        entropy=torch.tensor(0.5),
        unrouted=torch.tensor(2),
        cutoff_E=torch.tensor([0.25, 0.5]),
        groups=torch.tensor(1),
    )
    total = one + Statistics.zero(2) + one
    assert total.load_E.tolist() == [2, 4]
    assert total.cutoff_E.tolist() == [0.5, 1.0]
    assert (int(total.dropped), int(total.tokens), float(total.entropy)) == (2, 6, 1.0)
    assert (int(total.unrouted), int(total.groups)) == (4, 2)
