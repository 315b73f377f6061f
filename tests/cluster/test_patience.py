"""Waiting that ends."""

import threading

import pytest

from cluster.patience import left_behind, within


def test_what_a_call_returns_or_raises_comes_back() -> None:
    assert within(5.0, lambda: 7) == 7
    assert within(None, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 / 0)


def test_a_call_that_takes_too_long_is_left_behind() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.01, never.wait)
    assert left_behind()
    never.set()
    for thread in threading.enumerate():
        if thread.name == "within":
            thread.join(5.0)
    assert not left_behind()
