"""gptmoe.parallel.expert and mesh: rows travel to where they are sent, gradients come back.

Letters: R rows, D width.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gptmoe.model.turns import straight
from gptmoe.parallel.expert import Stopwatch, exchange
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.mesh import Mesh, join
from tests.ranks.pool import RankPool

WIDTH = 3
SENDS = {
    "uneven": [[1, 0, 2, 3], [2, 1, 0, 0], [0, 4, 1, 1], [5, 0, 0, 2]],
    "a rank gets nothing": [[1, 0, 2, 0], [3, 1, 0, 0], [0, 0, 1, 0], [2, 2, 2, 0]],
    "a rank sends nothing": [[1, 2, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 3, 0, 0]],
    "nobody sends anything": [[0] * 4] * 4,
}
"""Rows that rank i sends to rank j."""


def row_numbers(rank: int, sends: list[list[int]]) -> Tensor:
    """Rows of this rank, each with numbers that no other row has. [R, D]"""
    count = sum(sends[rank])
    return 1000.0 * rank + torch.arange(float(count * WIDTH)).view(count, WIDTH)


def send_and_return(rank: int, sends: list[list[int]]) -> tuple[Tensor, Tensor]:
    """What arrives, and the gradient of what was sent if it is sent back, stored by column."""
    receive = [row[rank] for row in sends]
    rows_RD = row_numbers(rank, sends).requires_grad_()
    world = join(Layout(dp=4), rank).world_group
    assert world is not None
    arrived_RD = straight(exchange(rows_RD, receive, sends[rank], world, Stopwatch()))
    columns_DR = arrived_RD.detach().t().contiguous()
    (gradient_RD,) = torch.autograd.grad(arrived_RD, rows_RD, columns_DR.t())
    return arrived_RD.detach(), gradient_RD


@pytest.mark.parametrize("sends", SENDS.values(), ids=SENDS)
def test_rows_arrive_by_source_and_gradients_come_home(
    pool: RankPool, sends: list[list[int]]
) -> None:
    found = pool.run(4, send_and_return, sends)
    parts = [row_numbers(rank, sends).split(sends[rank]) for rank in range(4)]
    for rank, (arrived_RD, gradient_RD) in enumerate(found):
        assert torch.equal(arrived_RD, torch.cat([part[rank] for part in parts]))
        assert torch.equal(gradient_RD, row_numbers(rank, sends))


def ranks_of(rank: int, layout: Layout) -> list[list[int] | None]:
    mesh: Mesh = join(layout, rank)
    mesh.barrier()
    groups = (mesh.world_group, mesh.expert_group, mesh.replica_group)
    return [None if group is None else dist.get_process_group_ranks(group) for group in groups]


@pytest.mark.parametrize(("dp", "ep"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_a_mesh_has_the_groups_of_its_layout(pool: RankPool, dp: int, ep: int) -> None:
    layout = Layout(dp=dp, ep=ep)
    kinds = ([list(range(dp))], layout.expert_groups(), layout.replica_groups())
    for rank, found in enumerate(pool.run(dp, ranks_of, layout)):
        mine = [next(ranks for ranks in groups if rank in ranks) for groups in kinds]
        assert found == [ranks if len(ranks) > 1 else None for ranks in mine]


def test_one_rank_needs_no_groups() -> None:
    assert ranks_of(0, Layout(dp=1)) == [None, None, None]
