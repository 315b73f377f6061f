"""The order of samples: every row once an epoch, the same everywhere."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.data.order import Order


@given(
    num_rows=st.integers(1, 200),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 9),
    data=st.data(),
)
def test_every_row_comes_once_an_epoch(
    num_rows: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    rows = Order(num_rows, seed).rows(epoch * num_rows, num_rows)
    assert sorted(rows) == list(range(num_rows))
    first = data.draw(st.integers(0, 3 * num_rows))
    counts = data.draw(st.lists(st.integers(0, num_rows), min_size=1, max_size=5))
    whole = Order(num_rows, seed).rows(first, sum(counts))
    starts = first + np.cumsum([0, *counts[:-1]])
    parts = [Order(num_rows, seed).rows(int(s), c) for s, c in zip(starts, counts, strict=True)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_epochs_and_seeds_differ() -> None:
    orders = [Order(1000, seed).rows(epoch * 1000, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 20


def test_without_a_seed_rows_come_in_order() -> None:
    assert Order(3, None).rows(1, 6).tolist() == [1, 2, 0, 1, 2, 0]


def test_the_order_is_the_same_in_another_process_and_for_ever() -> None:
    known = [0, 1, 4, 2, 5, 3, 3, 4, 2, 5, 0, 1]
    assert Order(6, 42).rows(0, 12).tolist() == known
    program = "from gptmoe.data.order import Order; print(Order(6, 42).rows(0, 12).tolist())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == str(known)


@pytest.mark.parametrize("num_rows", [7, 100_000])
def test_only_one_epoch_is_kept(num_rows: int) -> None:
    order = Order(num_rows, 0)
    for epoch in range(3):
        order.rows(epoch * num_rows, 4)
    held = [value for value in vars(order).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) == 4 * num_rows
