"""What the planner says when there is no plan: what was wanted, what is there, what would do."""

import math

from gptmoe.errors import LayoutError
from gptmoe.parallel.layout import Layout, choices, divisors

from .candidates import Wishes, layouts, microbatch_sizes, ways, zeros
from .devices import GIGA, Cluster
from .job import Choice, Job, check, tensor_sizes
from .memory import Memory


def does_not_fit(
    cluster: Cluster,
    choice: Choice,
    memory: Memory,
    usable_bytes: float,
    device_bytes: float,
    devices: int | None,
) -> LayoutError:
    """For the plan that needs least: the largest item, and what would fit.

    `device_bytes` is the memory of a device on which this plan fits, `devices` a number of devices
    on which another one does.
    """
    item, device = memory.largest, cluster.device
    advice = f"devices of at least {math.ceil(device_bytes / GIGA)} GB"
    if devices:
        advice = f"{devices} devices or more, or {advice}"
    return LayoutError(
        f"not enough memory on {cluster.num_devices} x {device.name} of "
        f"{device.memory_bytes / GIGA:.1f} GB: the smallest plan ({choice}) needs "
        f"{memory.total / GIGA:.1f} GB a device where {usable_bytes / GIGA:.1f} are usable, "
        f"{memory.items()[item] / GIGA:.1f} of it {item.replace('_', ' ')}; use {advice}"
    )


def refuse_wishes(job: Job, cluster: Cluster, wishes: Wishes) -> None:
    """Raise LayoutError, with both numbers and the valid choices, if no layout meets the wishes."""
    for name in ("dp", "tp", "ep", "pp", "microbatch_size", "chunks"):
        value = getattr(wishes, name)
        if value is not None and value < 1:
            raise LayoutError(f"{name}={value} must be at least 1")
    _refuse_batch(job, wishes)
    _refuse_alone(job, wishes)
    _refuse_ranks(cluster, wishes)
    for layout in layouts(job, wishes, cluster.num_devices, cluster.devices_per_node):
        if zeros(job, layout, wishes) and any(True for _ in ways(job, layout, wishes)):
            return
    raise _no_layout(job, cluster, wishes)


def _refuse_batch(job: Job, wishes: Wishes) -> None:
    least = job.least_sequences
    if job.batch_sequences % least:
        raise LayoutError(
            f"the batch of {job.batch_sequences} sequences must be a multiple of "
            f"router.group_sequences={least}, whose sequences share the experts' capacity; use "
            f"{(job.batch_sequences // least + 1) * least} sequences "
            f"({(job.batch_sequences // least + 1) * least * job.seq_len} tokens)"
        )
    size = wishes.microbatch_size or microbatch_sizes(job, wishes)[0]
    check(job, Choice(layout=Layout(dp=wishes.dp or 1), microbatch_size=size))


def _refuse_alone(job: Job, wishes: Wishes) -> None:
    """Each wish by itself, the others as plain as they can be."""
    size = wishes.microbatch_size or job.least_sequences
    for layout in (
        Layout(tp=wishes.tp or 1),
        Layout(dp=wishes.ep or 1, ep=wishes.ep or 1),
        Layout(pp=wishes.pp or 1),
    ):
        layout.check_experts(job.spec.num_experts)
        check(job, Choice(layout=Layout(tp=layout.tp, pp=layout.pp), microbatch_size=size))
    zero = wishes.zero if wishes.zero is not None else 0
    layout = Layout(tp=wishes.tp or 1, pp=wishes.pp or 1)
    check(job, Choice(layout=layout, microbatch_size=size, zero=zero))


def _refuse_ranks(cluster: Cluster, wishes: Wishes) -> None:
    given = {name: getattr(wishes, name) for name in ("dp", "tp", "pp") if getattr(wishes, name)}
    ranks = 1
    for value in given.values():
        ranks *= value
    if ranks > cluster.num_devices:
        product = " x ".join(f"{name}={value}" for name, value in given.items())
        raise LayoutError(
            f"{product} asks for {ranks} ranks, found {cluster.num_devices} devices; use a product "
            f"of at most {cluster.num_devices}, or more devices"
        )
    if wishes.dp and wishes.tp and wishes.ep:
        Layout(dp=wishes.dp, tp=wishes.tp, ep=wishes.ep)


def _no_layout(job: Job, cluster: Cluster, wishes: Wishes) -> LayoutError:
    asked = " ".join(
        f"{name}={getattr(wishes, name)}"
        for name in ("dp", "tp", "ep", "pp", "zero", "microbatch_size", "schedule", "chunks")
        if getattr(wishes, name) is not None
    )
    most_dp = job.batch_sequences // min(microbatch_sizes(job, wishes))
    return LayoutError(
        f"no layout of at most {cluster.num_devices} ranks has {asked}; dp can be "
        f"{choices(divisors(most_dp)[:12])}, tp {choices(tensor_sizes(job))}, "
        f"pp 1 to {job.spec.num_layers}, ep a divisor of dp x tp and of the experts: leave one out"
    )
