"""A training worker says what it owns."""

import secrets

import torch.distributed as dist

from cluster.coordinator_actor import join as join_coordinator
from cluster.provenance import code_digest
from cluster.reporter import Reporter
from cluster.shards.roles import message_of
from gptmoe.parallel.mesh import Mesh
from gptmoe.shard.parts import part_of_rank

from .plan import RunPlan


def register(plan: RunPlan, mesh: Mesh, run_name: str) -> Reporter:
    """Tell the run's coordinator what this rank owns: its layers, slice and experts. Collective."""
    group = [secrets.token_hex(4)]
    if mesh.world_group is not None:
        dist.broadcast_object_list(group, src=0, group=mesh.world_group)
    part = part_of_rank(plan.spec, mesh.layout, mesh.rank)
    return join_coordinator(
        run_name,
        group[0],
        worker=f"train-{mesh.rank}",
        rank=mesh.rank,
        shard=message_of(part),
        digest=f"{code_digest()}-{plan.stored_config()['digest']}",
    )
