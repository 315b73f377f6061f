"""The fastest plan that fits, and why the others are not.

    answer = search(job, machine("a100-80gb").cluster(8))
    answer.best.choice.layout

A step is compared with a step: the batch is fixed, so the fastest step is the cheapest token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gptmoe.parallel.layout import Layout

from .assumptions import Assumptions
from .candidates import Wishes, layouts, ways, zeros
from .compute import model_flops_per_token
from .devices import CPU, GIGA, Cluster, Machine
from .job import RECOMPUTES, Choice, Job, check
from .memory import Memory, fullest
from .refusal import does_not_fit, refuse_wishes
from .step_time import StepTime, step_time

RUNNERS_UP = 5
TOO_LARGE = 2
"""How many layouts that lost are named: slower ones, and ones that need too much memory."""

MOST_DEVICES = 4096

SAME = 1e-3
"""Steps that differ by less are called equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to train, with what it needs and how long a step takes."""

    choice: Choice
    memory: Memory
    usable_bytes: float
    """Of a device, for tensors."""
    time: StepTime
    tokens_per_s: float
    utilization: float
    """Model FLOPs (without recompute) over the peak of the ranks used (MFU)."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A plan that lost, and why in one sentence."""

    plan: Plan
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the planner found."""

    best: Plan
    runners_up: tuple[RunnerUp, ...]
    """The best plans of other layouts; then layouts that would need more memory."""
    layouts_seen: int


def search(
    job: Job,
    cluster: Cluster,
    wishes: Wishes | None = None,
    assumptions: Assumptions | None = None,
) -> Answer:
    """The fastest plan that fits on at most `cluster.num_devices` ranks.

    Raises LayoutError if a wish cannot be met (with what can), or if nothing fits (with the item
    that does not, and what would).
    """
    wishes, assumptions = wishes or Wishes(), assumptions or Assumptions()
    refuse_wishes(job, cluster, wishes)
    found = _search(job, cluster, wishes, assumptions)
    fitting = sorted((plan for plan in found if plan.fits), key=_rank)
    if not fitting:
        smallest = min(found, key=lambda plan: plan.memory.total)
        raise does_not_fit(
            cluster,
            smallest.choice,
            smallest.memory,
            smallest.usable_bytes,
            smallest.memory.total / (1 - assumptions.reserve) + cluster.device.runtime_bytes,
            _devices_that_fit(job, cluster, wishes, assumptions),
        )
    best, *slower = fitting
    large = sorted((p for p in found if not p.fits), key=lambda plan: plan.time.total)
    lost = [*slower[:RUNNERS_UP], *large[:TOO_LARGE]]
    return Answer(
        best=best,
        runners_up=tuple(RunnerUp(plan=plan, reason=why_lost(plan, best)) for plan in lost),
        layouts_seen=len(found),
    )


def best_layout(
    job: Job,
    num_ranks: int,
    *,
    machine: Machine = CPU,
    wishes: Wishes | None = None,
    assumptions: Assumptions | None = None,
) -> Layout:
    """The best valid layout of at most `num_ranks` ranks; the others stay idle.

    For a run whose number of workers changes: the batch stays as it is. Raises LayoutError as
    `search` does.
    """
    return search(job, machine.cluster(num_ranks), wishes, assumptions).best.choice.layout


def make_plan(job: Job, choice: Choice, cluster: Cluster, assumptions: Assumptions) -> Plan:
    """Memory and time of one choice. Raises LayoutError if it cannot train the job."""
    check(job, choice)
    return _plan(job, choice, cluster, assumptions, fullest(job, choice))


def usable_bytes(cluster: Cluster, assumptions: Assumptions) -> float:
    """Of a device's memory, what is left for tensors."""
    device = cluster.device
    return max(0.0, device.memory_bytes - device.runtime_bytes) * (1 - assumptions.reserve)


def why_lost(plan: Plan, best: Plan) -> str:
    """The main difference, as one sentence."""
    if not plan.fits:
        item = plan.memory.largest
        return (
            f"needs {plan.memory.total / GIGA:.1f} GB of {plan.usable_bytes / GIGA:.1f}, "
            f"{plan.memory.items()[item] / GIGA:.1f} of it {item.replace('_', ' ')}"
        )
    ours, theirs = best.time.items(), plan.time.items()
    slower = plan.time.total / best.time.total - 1
    item = max(theirs, key=lambda name: theirs[name] - ours[name])
    idle = best.choice.layout.world - plan.choice.layout.world
    reason = f"{slower:.1%} slower: {item} takes {theirs[item]:.3g} s, not {ours[item]:.3g}"
    if slower < SAME:
        reason = "as fast, but less plain"
    return reason + (f"; leaves {idle} more idle" if idle > 0 else "")


def _search(job: Job, cluster: Cluster, wishes: Wishes, assumptions: Assumptions) -> list[Plan]:
    """The best plan of each layout.

    Worlds of more than half of the ranks first; smaller ones as long as they are faster.
    """
    most, found, best_s = cluster.num_devices, [], float("inf")
    every = list(layouts(job, wishes, most, cluster.devices_per_node))
    while most:
        tier = [layout for layout in every if most // 2 < layout.world <= most]
        plans = [_of_layout(job, layout, cluster, wishes, assumptions) for layout in tier]
        found += [plan for plan in plans if plan]
        fastest_s = min((p.time.total for p in plans if p and p.fits), default=float("inf"))
        if fastest_s >= best_s < float("inf"):
            break
        best_s, most = min(best_s, fastest_s), most // 2
    return found


def _of_layout(
    job: Job, layout: Layout, cluster: Cluster, wishes: Wishes, assumptions: Assumptions
) -> Plan | None:
    """The fastest that fits, else the one that needs the least memory."""
    fitting: list[Plan] = []
    smallest: tuple[Choice, Memory] | None = None
    limit = usable_bytes(cluster, assumptions)
    for choice, memory in _first_that_fit(job, layout, wishes, limit):
        if memory.total <= limit:
            fitting.append(_plan(job, choice, cluster, assumptions, memory))
        elif smallest is None or memory.total < smallest[1].total:
            smallest = choice, memory
    if fitting:
        return min(fitting, key=_rank)
    if smallest:
        return _plan(job, smallest[0], cluster, assumptions, smallest[1])
    return None


def _first_that_fit(
    job: Job, layout: Layout, wishes: Wishes, limit: float
) -> Iterator[tuple[Choice, Memory]]:
    """Recompute only as much as must be: more of it is always slower."""
    recomputes = [wishes.recompute] if wishes.recompute else RECOMPUTES
    hopeless: set[tuple[int, int]] = set()  # their weights and optimizer alone are too large
    for size, schedule, chunks in ways(job, layout, wishes):
        dealt = layout if chunks == 1 else replace(layout, chunks=chunks)
        for zero in zeros(job, layout, wishes):
            if (zero, chunks) in hopeless:
                continue
            for recompute in recomputes:
                choice = Choice(
                    layout=dealt,
                    microbatch_size=size,
                    zero=zero,
                    recompute=recompute,
                    schedule=schedule,
                )
                memory = fullest(job, choice)
                if memory.state > limit:
                    hopeless.add((zero, chunks))
                if memory.total <= limit or recompute == recomputes[-1]:
                    yield choice, memory
                    break


def _plan(
    job: Job, choice: Choice, cluster: Cluster, assumptions: Assumptions, memory: Memory
) -> Plan:
    time = step_time(job, choice, cluster, assumptions)
    peak = choice.layout.world * cluster.device.flops_per_s(job.dtype)
    tokens_per_s = job.batch_tokens / time.total
    return Plan(
        choice=choice,
        memory=memory,
        usable_bytes=usable_bytes(cluster, assumptions),
        time=time,
        tokens_per_s=tokens_per_s,
        utilization=tokens_per_s * model_flops_per_token(job) / peak,
    )


def _rank(plan: Plan) -> tuple[float, ...]:
    """Fastest first; of equals the plainest."""
    choice = plan.choice
    layout = choice.layout
    plain = (choice.zero, layout.pp, layout.tp, layout.ep, layout.chunks, choice.microbatch_size)
    return (float(f"{plan.time.total:.4g}"), *plain)


def _devices_that_fit(
    job: Job, cluster: Cluster, wishes: Wishes, assumptions: Assumptions
) -> int | None:
    """The smallest power of two times the devices there are on which some plan fits."""
    limit, devices = usable_bytes(cluster, assumptions), cluster.num_devices * 2
    while devices <= MOST_DEVICES:
        larger = replace(cluster, num_devices=devices)
        for layout in layouts(job, wishes, devices, larger.devices_per_node):
            if layout.world > devices // 2:
                tried = _first_that_fit(job, layout, wishes, limit)
                if any(memory.total <= limit for _, memory in tried):
                    return devices
        devices *= 2
    return None
