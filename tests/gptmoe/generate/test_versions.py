"""Which versions of the weights are held, while some come and others go."""

import sys
import threading
from collections.abc import Iterator

import pytest

from gptmoe.generate.versions import Versions


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


def test_older_ones_go_and_newer_ones_stay() -> None:
    versions = Versions[str]()
    for version in (0, 1, 2, 3):
        versions.add(version, str(version))
    before = versions.held
    versions.keep({0, 2})
    assert versions.held == {0: "0", 2: "2", 3: "3"}
    assert list(before) == [0, 1, 2, 3], "whoever has read it goes on with it"


def test_one_that_is_dropped_while_another_comes_does_not_come_back() -> None:
    for _ in range(300):
        versions = Versions[int]()
        versions.add(0, 0)
        versions.add(1, 1)
        adding = threading.Thread(target=versions.add, args=(2, 2))
        adding.start()
        versions.keep({1})
        adding.join()
        assert versions.held == {1: 1, 2: 2}
