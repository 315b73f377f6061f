"""Which sparse model costs as much per token as a dense one, on the same devices and batch.

The cost of a token is the time of a step of all devices over its tokens. A layer with top-1 experts
multiplies what a dense one does; what it costs more is its all-to-all, its imbalance, the memory of
its experts (which forces recompute or wider layouts) and their gradients.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from gptmoe.errors import LayoutError
from gptmoe.model.counts import Count, parameters
from gptmoe.model.spec import ModelSpec, expand_experts

from .assumptions import Assumptions
from .candidates import Wishes
from .devices import Cluster
from .job import Job
from .search import Plan, search

EXPERTS = (8, 16, 32, 64, 128, 256)
TOLERANCE = 0.1
SMALLEST = 0.25
"""Dense sizes below this share of the asked one's parameters are not tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """A sparse model that fits on the devices."""

    name: str
    count: Count
    plan: Plan
    cost: float
    """Of a token, over the dense model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualCost:
    """The dense model's plan, and what can be had for its price."""

    dense: Plan
    dense_count: Count
    most: Sparse | None
    """The most parameters for at most the dense model's cost and the tolerance."""
    equal: tuple[Sparse, ...]
    """Within the tolerance of the dense model's cost, the most parameters first."""
    nearest: tuple[Sparse, ...]
    """The others that fit, the nearest cost first."""
    too_large: tuple[str, ...]
    """Do not fit on the devices."""


def equal_cost(
    job: Job,
    bases: Mapping[str, ModelSpec],
    cluster: Cluster,
    *,
    tolerance: float = TOLERANCE,
    wishes: Wishes | None = None,
    assumptions: Assumptions | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> EqualCost:
    """Plan the dense `job` and mixtures over the dense `bases`, and compare their costs.

    `on_progress` is told the share that is done, from 0 to 1.

    Raises LayoutError if the model has experts already, or does not fit itself.
    """
    if job.spec.num_experts:
        raise LayoutError(
            f"the model has {sum(job.spec.num_experts)} experts; name a dense one to compare with"
        )
    dense = search(job, cluster, wishes, assumptions).best
    found, too_large = [], []
    mixtures = list(_mixtures(job, bases))
    for number, (name, spec) in enumerate(mixtures):
        if on_progress:
            on_progress(number / len(mixtures))
        sparse_job = replace(job, spec=spec)
        try:
            plan = search(sparse_job, cluster, wishes, assumptions).best
        except LayoutError:
            too_large.append(name)
            continue
        cost = plan.time.total / dense.time.total
        found.append(Sparse(name=name, count=parameters(spec), plan=plan, cost=cost))
    affordable = [sparse for sparse in found if sparse.cost <= 1 + tolerance]
    equal = [sparse for sparse in found if abs(sparse.cost - 1) <= tolerance]
    others = [sparse for sparse in found if abs(sparse.cost - 1) > tolerance]
    return EqualCost(
        dense=dense,
        dense_count=parameters(job.spec),
        most=max(affordable, key=lambda sparse: sparse.count.total, default=None),
        equal=tuple(sorted(equal, key=lambda sparse: -sparse.count.total)),
        nearest=tuple(sorted(others, key=lambda sparse: abs(sparse.cost - 1))),
        too_large=tuple(too_large),
    )


def _mixtures(job: Job, bases: Mapping[str, ModelSpec]) -> Iterator[tuple[str, ModelSpec]]:
    """Experts on every second layer of the dense sizes around and below the asked one."""
    most = parameters(job.spec).total
    for name, base in bases.items():
        size = parameters(base).total
        if base.num_experts or not SMALLEST * most <= size <= 1.01 * most:
            continue
        for count in EXPERTS:
            experts = expand_experts(count, base.num_layers, 2)
            spec = replace(base, num_experts=experts, expert_interval=2)
            yield f"{name}+MoE-{count}", replace(spec, max_seq_len=job.spec.max_seq_len)
