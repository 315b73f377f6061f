"""A training worker says what it owns."""

import secrets

import torch.distributed as dist

from cluster.coordinator_actor import join as join_coordinator
from cluster.messages import ExpertRange, Shard
from cluster.provenance import code_digest
from cluster.reporter import Reporter
from gptmoe.parallel.mesh import Mesh

from .plan import RunPlan


def register(plan: RunPlan, mesh: Mesh, run_name: str) -> Reporter:
    """Tell the run's coordinator what this rank owns: its layers, slice and experts. Collective."""
    group = [secrets.token_hex(4)]
    if mesh.world_group is not None:
        dist.broadcast_object_list(group, src=0, group=mesh.world_group)
    layout, place = mesh.layout, mesh.place
    layers = layout.layers_of(mesh.rank, plan.spec.num_layers)
    experts = tuple(
        ExpertRange(layer=layer, first=first, end=end)
        for layer in sorted(set(layers) & set(plan.spec.moe_layers))
        for first, end in [layout.experts_of(mesh.rank, plan.spec.experts_in_layer(layer))]
    )
    shard = Shard(
        stage=place.stage, layers=layers, slice=place.slice, slices=layout.tp, experts=experts
    )
    return join_coordinator(
        run_name,
        group[0],
        worker=f"train-{mesh.rank}",
        rank=mesh.rank,
        shard=shard,
        digest=f"{code_digest()}-{plan.stored_config()['digest']}",
    )
