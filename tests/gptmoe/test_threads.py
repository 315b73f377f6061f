"""Work that leaves no threads behind."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gptmoe.errors import ConfigError
from gptmoe.threads import in_brief_thread

TASKS = Path("/proc/self/task")
ENDS_WITHIN_S = 10.0


def compute() -> float:
    """Large enough for all threads of the pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        return float(torch.ones(1_000_000).mul(2).sum())
    finally:
        torch.set_num_threads(before)


def _threads() -> set[str]:
    """Of this process; what other tests have left may end at any time."""
    return set(os.listdir(TASKS))


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted where Linux lists them")
def test_a_pool_ends_with_its_thread_which_in_a_thread_that_stays_it_does_not() -> None:
    before = _threads()
    assert in_brief_thread(compute) == 2_000_000
    give_up_s = time.monotonic() + ENDS_WITHIN_S
    while _threads() - before and time.monotonic() < give_up_s:
        time.sleep(0.01)
    assert not _threads() - before
    with ThreadPoolExecutor(1) as stays:
        stays.submit(compute).result()
        assert len(_threads() - before) >= 4


def test_what_it_raises_is_raised_here() -> None:
    def refuse() -> None:
        raise ConfigError("not today")

    with pytest.raises(ConfigError, match="not today"):
        in_brief_thread(refuse)
