"""Every way to train a job on a number of ranks that may be worth a look. All are valid.

Left out because something listed is never slower: a pipeline longer than needed for its largest
stage, GPipe (1F1B takes as long and holds less), microbatches that are not a power of two times
the smallest. What is asked for by name is listed all the same.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.layout import Layout, divisors
from gptmoe.parallel.schedules import Kind

from .job import Job, Recompute, tensor_sizes

MOST_CHUNKS = 8

MOST_TOKENS = 65_536
"""Of a microbatch: with more rows than that no product gets faster."""

SEARCHED_ZEROS = (0, 1, 2, 3)
"""What training offers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is decided already; None leaves it to the planner."""

    dp: int | None = None
    tp: int | None = None
    ep: int | None = None
    pp: int | None = None
    zero: int | None = None
    recompute: Recompute | None = None
    microbatch_size: int | None = None
    schedule: Kind | None = None
    chunks: int | None = None


def layouts(job: Job, wishes: Wishes, most_ranks: int, node: int) -> Iterator[Layout]:
    """Valid layouts of at most `most_ranks` ranks; `node` devices share the fast links.

    Tensor parallelism stays in a node unless it is asked for: between nodes it never pays.
    """
    tensors = [wishes.tp] if wishes.tp else [tp for tp in tensor_sizes(job) if tp <= node]
    for tp in tensors:
        for pp in [wishes.pp] if wishes.pp else _pipelines(job.spec.num_layers):
            for dp in _data(job, wishes, most_ranks // (tp * pp)):
                for ep in _experts(job.spec, wishes, dp * tp):
                    yield Layout(dp=dp, tp=tp, ep=ep, pp=pp)


def ways(job: Job, layout: Layout, wishes: Wishes) -> Iterator[tuple[int, Kind, int]]:
    """(microbatch_size, schedule, chunks) that go with a layout."""
    share = job.batch_sequences // layout.dp
    for size in microbatch_sizes(job, wishes):
        if share % size == 0:
            for schedule, chunks in _schedules(job.spec, layout.pp, share // size, wishes):
                yield size, schedule, chunks


def zeros(job: Job, layout: Layout, wishes: Wishes) -> list[int]:
    """ZeRO stages that go with a layout, the plainest first."""
    if wishes.zero is not None:
        allowed = [wishes.zero]
    elif layout.dp * layout.tp == layout.ep and layout.dp == 1:
        return [0]
    else:
        allowed = list(SEARCHED_ZEROS)
    return [zero for zero in allowed if zero < 2 or _may_split(job, layout, zero)]


def microbatch_sizes(job: Job, wishes: Wishes) -> list[int]:
    """Sequences of a microbatch: the fewest that keep routing groups whole, and their doubles."""
    if wishes.microbatch_size:
        return [wishes.microbatch_size]
    sizes: list[int] = []
    size = job.least_sequences
    while job.batch_sequences % size == 0 and (not sizes or size * job.seq_len <= MOST_TOKENS):
        sizes.append(size)
        size *= 2
    return sizes


def _may_split(job: Job, layout: Layout, zero: int) -> bool:
    if zero == 2:
        return layout.pp == 1
    return layout.pp == layout.tp == 1 and not job.spec.num_experts


def _pipelines(num_layers: int) -> list[int]:
    """The shortest pipeline for each size of the largest stage."""
    return sorted({math.ceil(num_layers / size) for size in range(1, num_layers + 1)})


def _data(job: Job, wishes: Wishes, most: int) -> list[int]:
    sizes = microbatch_sizes(job, wishes)
    if not sizes:
        return []
    most_dp = job.batch_sequences // min(sizes)
    if wishes.dp:
        good = wishes.dp <= most and most_dp % wishes.dp == 0
        return [wishes.dp] if good else []
    return [dp for dp in divisors(most_dp) if dp <= most]


def _experts(spec: ModelSpec, wishes: Wishes, span: int) -> list[int]:
    if not spec.num_experts:
        return [1] if wishes.ep in (None, 1) else []
    if wishes.ep:
        return [wishes.ep] if span % wishes.ep == 0 else []
    return divisors(math.gcd(span, *spec.num_experts))


def _schedules(
    spec: ModelSpec, pp: int, microbatches: int, wishes: Wishes
) -> list[tuple[Kind, int]]:
    found: list[tuple[Kind, int]] = []
    wanted = wishes.schedule
    if wanted == "gpipe" or (wanted in (None, "1f1b") and wishes.chunks in (None, 1)):
        found.append((wanted or "1f1b", 1))
    if wanted in (None, "interleaved") and pp > 1 and microbatches % pp == 0:
        found += [
            ("interleaved", chunks)
            for chunks in ([wishes.chunks] if wishes.chunks else range(2, MOST_CHUNKS + 1))
            if chunks > 1 and spec.num_layers % (pp * chunks) == 0
        ]
    return found
