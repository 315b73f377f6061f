"""The pool itself: fresh groups, failures with their tracebacks, no hang."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.ranks.pool import GROUP_TIMEOUT, RankError, RankPool


def total(rank: int, number: int) -> int:
    value = torch.tensor(number * 10**rank)
    dist.all_reduce(value)
    return int(value)


def fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 has a reason")
    total(rank, 1)


def leave_out_rank_1(rank: int) -> None:
    if rank != 1:
        total(rank, 1)
    else:
        time.sleep(60)


def die_on_rank_1(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    total(rank, 1)


def process_id(rank: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_run_has_a_fresh_group_on_the_same_processes(pool: RankPool, world: int) -> None:
    before = pool.run(world, process_id)
    assert pool.run(world, total, 3) == [int("3" * world)] * world
    assert pool.run(world, process_id) == before
    assert len(set(before)) == world


def test_a_failure_comes_back_with_its_traceback_and_frees_the_others(pool: RankPool) -> None:
    began_s = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 4: .*in fail_on_rank_1.*has a reason"):
        pool.run(4, fail_on_rank_1)
    assert time.monotonic() - began_s < GROUP_TIMEOUT.total_seconds() / 2
    assert pool.run(4, total, 1) == [1111] * 4


def test_a_hang_ends(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank [02] of 3: |ranks still running: 0, 1, 2"):
        pool.run(3, leave_out_rank_1, limit_s=6, group_timeout=timedelta(seconds=4))
    assert pool.run(3, total, 1) == [111] * 3


def test_a_death_is_told(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: the process died|rank 0 of 2: "):
        pool.run(2, die_on_rank_1)
    assert pool.run(2, total, 1) == [11] * 2
