"""Seconds of the messages between ranks.

Ranks count tensor slices first, then data, then stages, and fill node after node. A group's members
in one node share its network cards, so a ring over k members a node gets k of them (Thakur et al.
2005 for the costs of rings). Nothing is overlapped unless assumptions.overlap says so.
"""

from dataclasses import dataclass

from .assumptions import Assumptions
from .devices import Cluster
from .job import Choice, Job
from .memory import GRADIENT_BYTES, WEIGHT_BYTES
from .stages import Stage

ROW_SIZE_MESSAGES = 1
"""Before rows are exchanged, ranks tell each other how many: one small all-to-all."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that communicate: how many, and how many of them share a node."""

    size: int
    in_node: int


def group_of(size: int, stride: int, cluster: Cluster) -> Group:
    """`size` ranks, each `stride` after the other."""
    return Group(size, max(1, min(size, cluster.devices_per_node // stride)))


def ring_s(moved_bytes: float, group: Group, cluster: Cluster, assumptions: Assumptions) -> float:
    """All-gather or reduce-scatter of `moved_bytes` in all, by a ring; all-reduce is both."""
    if group.size == 1:
        return 0.0
    rate = cluster.link_bytes_per_s
    if group.in_node < group.size:
        rate = min(rate, group.in_node * cluster.network_bytes_per_s)
    wire = moved_bytes * (group.size - 1) / group.size
    hops = min(group.size - 1, group.in_node - 1 + group.size // group.in_node)
    return wire / (rate * assumptions.link_efficiency) + hops * cluster.latency_s


def exchange_s(
    sent_bytes: float, group: Group, cluster: Cluster, assumptions: Assumptions
) -> float:
    """All-to-all in which each rank sends `sent_bytes` in all, evenly to every member."""
    if group.size == 1:
        return 0.0
    inside = sent_bytes * (group.in_node - 1) / group.size / cluster.link_bytes_per_s
    outside = sent_bytes * (group.size - group.in_node) / group.size / cluster.network_bytes_per_s
    messages = group.in_node - 1 + group.size // group.in_node
    return max(inside, outside) / assumptions.link_efficiency + messages * cluster.latency_s


def tensor_s(
    job: Job, choice: Choice, stage: Stage, cluster: Cluster, assumptions: Assumptions
) -> float:
    """Tensor and sequence parallelism, one microbatch: Korthikanti et al. 2022, section 4.2.

    An all-gather and a reduce-scatter around attention and around a dense feed-forward layer; in
    the backward pass the same, and the input is gathered once more.
    """
    if choice.layout.tp == 1:
        return 0.0
    tokens = choice.microbatch_size * job.seq_len
    once = ring_s(
        tokens * job.spec.d_model * job.width_bytes,
        group_of(choice.layout.tp, 1, cluster),
        cluster,
        assumptions,
    )
    each = 2 + 3 + (2 if choice.recompute == "full" else 0)
    pairs = stage.layers + stage.dense_layers + len(stage.experts) * job.spec.shared_layers
    return once * (each * pairs + (3 if stage.last else 0) + (2 if stage.first else 0))


def expert_s(
    job: Job, choice: Choice, stage: Stage, cluster: Cluster, assumptions: Assumptions
) -> float:
    """Rows to their experts and back, forward and backward, one microbatch."""
    layout = choice.layout
    if layout.ep == 1 or not stage.experts:
        return 0.0
    rows = choice.microbatch_size * job.seq_len / layout.tp * assumptions.expert_imbalance
    rows *= job.spec.router.rows_per_token
    group = group_of(layout.ep, 1, cluster)
    once = exchange_s(rows * job.spec.d_model * job.width_bytes, group, cluster, assumptions)
    sizes = ROW_SIZE_MESSAGES * exchange_s(0.0, group, cluster, assumptions)
    recomputed = choice.recompute == "full"
    times = 6 if recomputed else 4
    return len(stage.experts) * (times * once + (2 if recomputed else 1) * sizes)


def pipeline_s(job: Job, choice: Choice, cluster: Cluster, assumptions: Assumptions) -> float:
    """Activations to the next stage and gradients back, one microbatch."""
    layout = choice.layout
    if layout.pp == 1:
        return 0.0
    tokens = choice.microbatch_size * job.seq_len / layout.tp
    outside = _ends(choice, cluster).in_node == 1
    rate = cluster.network_bytes_per_s if outside else cluster.link_bytes_per_s
    sent = tokens * job.spec.d_model * job.width_bytes
    once = sent / (rate * assumptions.link_efficiency) + cluster.latency_s
    return 2 * choice.layout.chunks * once


def _ends(choice: Choice, cluster: Cluster) -> Group:
    """First and last stage: in one node only if the whole pipeline is."""
    return Group(2, 2 if choice.layout.world <= cluster.devices_per_node else 1)


def gradients_s(
    job: Job, choice: Choice, stage: Stage, cluster: Cluster, assumptions: Assumptions
) -> float:
    """Sum the gradients over the ranks that hold the same weights, once a step.

    With ZeRO 1 or 2 half of it is the gathering of the new weights (arXiv 1910.02054, section 7).
    """
    if choice.zero == 3:
        return 0.0
    layout = choice.layout
    dense = GRADIENT_BYTES * (stage.sliced / layout.tp + stage.whole)
    expert = GRADIENT_BYTES * stage.expert / layout.ep
    replicas = layout.expert_span // layout.ep
    half = ring_s(dense, group_of(layout.dp, layout.tp, cluster), cluster, assumptions)
    half += ring_s(expert, group_of(replicas, layout.ep, cluster), cluster, assumptions)
    if layout.pp > 1 and (stage.first or stage.last):  # the token table is also the head
        table = GRADIENT_BYTES * job.spec.vocab_size * job.spec.d_model / layout.tp
        half += ring_s(table, _ends(choice, cluster), cluster, assumptions)
    return 2 * half * (1 - assumptions.overlap)


def gather_weights_s(
    job: Job, choice: Choice, stage: Stage, cluster: Cluster, assumptions: Assumptions
) -> float:
    """ZeRO 3, one microbatch: weights gathered forward and backward, gradients scattered."""
    if choice.zero != 3:
        return 0.0
    parameters = stage.sliced + stage.whole
    group = group_of(choice.layout.dp, 1, cluster)
    width = job.width_bytes if assumptions.narrow_weights else WEIGHT_BYTES
    gathers = 2 * ring_s(width * parameters, group, cluster, assumptions)
    return gathers + ring_s(GRADIENT_BYTES * parameters, group, cluster, assumptions)
