"""Seconds of a step on machines that are not here, and the replica that is best on them. Pure.

A roofline with the planner's device table, stages, links and assumptions: bytes of active weights,
keys and values over the memory's rate or products over the peak, rows over links, messages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from cluster.planner.assumptions import Assumptions
from cluster.planner.candidates import Wishes, layouts
from cluster.planner.compute import layer_flops
from cluster.planner.devices import Cluster, machine
from cluster.planner.job import Job
from cluster.planner.links import exchange_s, group_of, ring_s
from cluster.planner.models import by_name
from cluster.planner.search import usable_bytes
from cluster.planner.stages import Stage, stages
from gptmoe.errors import LayoutError
from gptmoe.generate.plan import StepPlan
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.layout import Layout
from gptmoe.shard.parts import Part, arrange

WIDTH_BYTES = 2
"""Weights, keys, values and hidden states are bfloat16."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one data rank has to do in a step."""

    rows: int = 0
    cached: int = 0
    """Positions whose keys and values are read."""
    pairs: int = 0
    """Queries times keys."""
    outputs: int = 0


def work_of(plan: StepPlan, dp: int) -> list[Work]:
    """By data rank; slot s belongs to data rank s % dp."""
    found = [Work() for _ in range(dp)]
    for span in plan.spans:
        old, end = found[span.slot % dp], span.start + span.count
        found[span.slot % dp] = Work(
            old.rows + span.count,
            old.cached + end,
            old.pairs + span.count * (span.start + end) // 2,
            old.outputs + span.outputs,
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of steps of one replica."""

    job: Job
    layout: Layout
    cluster: Cluster
    assumptions: Assumptions = field(default_factory=Assumptions)
    message_s: float = 1e-4
    """The engine encodes, sends or receives a header. Assumed."""
    scores_bytes_per_s: float = 3e9
    """Scores travel to the engine through hosts, not between devices. Assumed."""

    @property
    def spec(self) -> ModelSpec:
        return self.job.spec

    def step_s(self, pieces: Sequence[Sequence[Work]]) -> float:
        """Of a step cut into these pieces, each by data rank: fill the pipeline, then drain it."""
        every = stages(self.spec, self.layout.pp)
        times_s = [[self._stage_s(stage, works) for stage in every] for works in pieces]
        first_s = sum(times_s[0])
        rest_s = sum(max(times) for times in times_s[1:])
        outputs = sum(work.outputs for works in pieces for work in works)
        scores_bytes = outputs * self.spec.vocab_size * WIDTH_BYTES
        messages = 2 * self.layout.dp * self.layout.tp * len(pieces)
        return (
            first_s
            + rest_s
            + scores_bytes / self.scores_bytes_per_s
            + messages * self.message_s
            + self.layout.pp * self.cluster.latency_s
        )

    def _stage_s(self, stage: Stage, works: Sequence[Work]) -> float:
        """Of one stage, by the data rank that has most to do; sent on at the end."""
        work = max(works, key=lambda work: (work.rows, work.cached))
        rows = sum(work.rows for work in works)
        kinds = {0: stage.dense_layers}
        for count in stage.experts:
            kinds[count] = kinds.get(count, 0) + 1
        seconds = sum(
            layers * (self._layer_s(count, work, rows) + self._links_s(count, work.rows))
            for count, layers in kinds.items()
            if layers
        )
        if stage.last:
            table = self.spec.vocab_size * self.spec.d_model / self.layout.tp
            seconds += self._roofline_s(2.0 * work.outputs * table, table * WIDTH_BYTES)
        else:
            sent = work.rows * self.spec.d_model * WIDTH_BYTES
            seconds += sent / self.cluster.network_bytes_per_s + self.cluster.latency_s
        return seconds

    def _layer_s(self, experts: int, work: Work, rows: int) -> float:
        """Bytes of active weights, keys and values over the memory's rate, or the products."""
        spec, tp, uneven = self.spec, self.layout.tp, self.assumptions.expert_imbalance
        ffn_flops, ffn_weights = 4.0 * spec.d_model * spec.d_ff, 2.0 * spec.d_model * spec.d_ff
        others = (layer_flops(self.job, experts) - ffn_flops) * work.rows / tp
        seconds = self._roofline_s(others, 4.0 * spec.d_model**2 / tp * WIDTH_BYTES)
        seconds += self._roofline_s(
            4.0 * spec.d_model * work.pairs / tp,
            2.0 * spec.d_model * work.cached / tp * WIDTH_BYTES,
        )
        if experts:
            copies = self.layout.expert_span // self.layout.ep
            own_rows = rows / self.layout.expert_span * (uneven if self.layout.ep > 1 else 1.0)
            hit = active_experts(experts, rows / copies) / self.layout.ep
            seconds += self._roofline_s(own_rows * ffn_flops, hit * ffn_weights * WIDTH_BYTES)
        else:
            seconds += self._roofline_s(work.rows * ffn_flops / tp, ffn_weights / tp * WIDTH_BYTES)
        kernels = self.assumptions.layer_kernels + (self.assumptions.moe_kernels if experts else 0)
        forward = 1 / 3  # of the kernels, which are counted forward and backward
        return max(seconds, forward * kernels * self.cluster.device.kernel_s)

    def _links_s(self, experts: int, rows: int) -> float:
        """Sums of slices, and rows on their way to experts and back."""
        layout, sent_bytes = self.layout, rows * self.spec.d_model * WIDTH_BYTES
        slices = group_of(layout.tp, 1, self.cluster)
        rings = 2 if experts else 4  # a sum is two rings; one after attention, one after the rest
        seconds = rings * ring_s(sent_bytes, slices, self.cluster, self.assumptions)
        if experts and layout.ep > 1:
            group = group_of(layout.expert_span, 1, self.cluster)
            uneven = self.assumptions.expert_imbalance
            each_bytes = sent_bytes / layout.tp * uneven
            seconds += 2 * exchange_s(each_bytes, group, self.cluster, self.assumptions)
            seconds += exchange_s(0.0, group, self.cluster, self.assumptions)  # how many rows
        return seconds

    def _roofline_s(self, flops: float, moved_bytes: float) -> float:
        device, assumed = self.cluster.device, self.assumptions
        rate = device.flops_per_s("bfloat16") * assumed.product_efficiency
        return max(
            flops / rate, moved_bytes / (device.memory_bytes_per_s * assumed.memory_efficiency)
        )


def active_experts(experts: int, rows: float) -> float:
    """How many of a layer's experts are read for so many rows, each of which asks for one."""
    return experts * -math.expm1(rows * math.log1p(-1 / experts)) if experts > 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One group of shards as it was planned."""

    parts: tuple[Part, ...]
    timing: Timing
    slots: int
    """Sequences that run at once."""
    weights_bytes: tuple[float, ...]
    """By rank."""
    memory_bytes: float
    """Of the fullest rank, keys and values of all slots included."""
    tokens_per_s: float
    """While all slots decode at half the context."""


@cache
def plan_replica(name: str, device: str, most_ranks: int, slots_per_rank: int) -> Replica:
    """The replica of at most so many ranks with most tokens a second and rank that fits.

    Of those within 2 % the smallest. Raises LayoutError if none fits.
    """
    job, cluster = by_name(name).job(), machine(device).cluster(most_ranks)
    found: list[Replica] = []
    for layout in layouts(job, Wishes(), most_ranks, cluster.devices_per_node):
        replica = _replica(job, layout, cluster, slots_per_rank * layout.world)
        if replica and replica.memory_bytes <= usable_bytes(cluster, Assumptions()):
            found.append(replica)
    if not found:
        raise LayoutError(f"{most_ranks} x {device} do not hold a replica of {name}")

    def rate(replica: Replica) -> float:
        return replica.tokens_per_s / len(replica.parts)

    best = max(map(rate, found))
    near = [replica for replica in found if rate(replica) >= 0.98 * best]
    return min(near, key=lambda replica: (len(replica.parts), -rate(replica)))


def _replica(job: Job, layout: Layout, cluster: Cluster, slots: int) -> Replica | None:
    try:
        parts = arrange(job.spec, dp=layout.dp, tp=layout.tp, ep=layout.ep, pp=layout.pp)
    except LayoutError:
        return None
    every = stages(job.spec, layout.pp)
    own = [
        WIDTH_BYTES * (stage.sliced / layout.tp + stage.whole + stage.expert / layout.ep)
        for stage in every
    ]
    position_bytes = 2 * job.spec.d_model / layout.tp * WIDTH_BYTES * slots / layout.dp
    kept = [stage.layers * position_bytes * job.seq_len for stage in every]
    timing = Timing(job=job, layout=layout, cluster=cluster)
    each, half = slots // layout.dp, job.seq_len // 2
    full = Work(rows=each, cached=each * half, pairs=each * half, outputs=each)
    return Replica(
        parts=parts,
        timing=timing,
        slots=slots,
        weights_bytes=tuple(own[part.stage] for part in parts),
        memory_bytes=max(map(sum, zip(own, kept, strict=True))),
        tokens_per_s=slots / timing.step_s([[full] * layout.dp]),
    )
