"""Seconds of one optimizer step, item by item, by the stage that takes longest."""

from dataclasses import dataclass, fields, replace

from . import compute, links
from .assumptions import Assumptions
from .devices import Cluster, Device
from .job import Choice, Job


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds; the items add up to the step."""

    compute: float
    tensor: float
    """Collectives of tensor parallelism."""
    expert: float
    """All-to-all of the experts' rows."""
    sends: float
    """Between pipeline stages."""
    bubble: float
    """Waiting for the pipeline to fill and to drain."""
    weights: float
    """ZeRO 3: gathering weights, scattering gradients."""
    gradients: float
    """Summed over data-parallel ranks; with ZeRO 1 and 2, new weights gathered."""
    optimizer: float

    @property
    def total(self) -> float:
        sends = self.tensor + self.expert + self.sends + self.weights + self.gradients
        return self.compute + self.bubble + self.optimizer + sends

    def items(self) -> dict[str, float]:
        """By name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def bubble_fraction(pp: int, chunks: int, microbatches: int) -> float:
    """Idle time over working time: (pp - 1) / (v m) (arXiv 2104.04473, section 2.2).

    The same for GPipe and 1F1B with v = 1.
    """
    return (pp - 1) / (chunks * microbatches)


def step_time(job: Job, choice: Choice, cluster: Cluster, assumptions: Assumptions) -> StepTime:
    """Of the whole batch."""
    device, microbatches = cluster.device, choice.microbatches(job)
    stage = compute.slowest(job, choice, device, assumptions)
    own = compute.microbatch_s(job, choice, stage, device, assumptions)
    tensor = links.tensor_s(job, choice, stage, cluster, assumptions)
    expert = links.expert_s(job, choice, stage, cluster, assumptions)
    weights = links.gather_weights_s(job, choice, stage, cluster, assumptions)
    sends = links.pipeline_s(job, choice, cluster, assumptions)
    worked = microbatches * (own + tensor + expert + weights)
    bubble = bubble_fraction(choice.layout.pp, choice.layout.chunks, microbatches)
    return StepTime(
        compute=microbatches * own,
        tensor=microbatches * tensor,
        expert=microbatches * expert,
        sends=microbatches * sends,
        bubble=bubble * worked,
        weights=microbatches * weights,
        gradients=links.gradients_s(job, choice, stage, cluster, assumptions),
        optimizer=compute.optimizer_s(job, choice, stage, device, assumptions),
    )


def sent_bytes(job: Job, choice: Choice, assumptions: Assumptions) -> dict[str, float]:
    """Bytes that a rank of the slowest stage sends in a step, by the names of StepTime's items."""
    device = Device(
        name="counter",
        memory_bytes=1,
        bfloat16_flops_per_s=1,
        float32_flops_per_s=1,
        memory_bytes_per_s=1,
    )
    counter = Cluster(  # at one byte a second on every link, seconds are bytes
        num_devices=choice.layout.world,
        device=device,
        devices_per_node=choice.layout.world,
        link_bytes_per_s=1,
        network_bytes_per_s=1,
        latency_s=0,
    )
    plain = replace(assumptions, link_efficiency=1, overlap=0)
    items = step_time(job, choice, counter, plain).items()
    return {name: items[name] for name in ("tensor", "expert", "sends", "weights", "gradients")}
