"""Which layout a run takes with the workers that there are: pure."""

import dataclasses
from collections.abc import Iterator
from itertools import chain

from cluster.planner.candidates import Wishes
from cluster.planner.devices import CPU, Machine
from cluster.planner.search import search
from gptmoe.errors import ConfigError, LayoutError
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.layout import divisors

from .config import TrainConfig
from .memory import job_of
from .parallel_config import ParallelConfig


def fit(config: TrainConfig, spec: ModelSpec, workers: int, machine: Machine = CPU) -> TrainConfig:
    """The run with a layout of at most `workers` ranks on `machine`; the batch and all else stay.

    The layout asked for, if it fits. Else the fastest that fits their memory by the planner. If it
    knows none, the one nearest to what was asked for: with its slices, stages and expert ranks, and
    as many data ranks as there are workers for; with fewer of the others only if that cannot be.
    Workers that no layout can use stay idle. Raises LayoutError if nothing fits.
    """
    if config.parallel.layout().world <= workers:
        return config
    # It says how many must be there, not how many a layout must use.
    asked = dataclasses.replace(config.parallel, min_workers=None)
    config = dataclasses.replace(config, parallel=asked)
    for parallel in chain(_planned(config, spec, workers, machine), _nearest_first(asked, workers)):
        smaller = _valid(config, spec, parallel)
        if smaller:
            return smaller
    raise LayoutError(
        f"{workers} workers cannot train this run, which asks for "
        f"{config.parallel.layout().world}; raise parallel.min_workers or choose a "
        "train.batch_tokens with more divisors"
    )


def _planned(
    config: TrainConfig, spec: ModelSpec, workers: int, machine: Machine
) -> Iterator[ParallelConfig]:
    """The planner's layout, if it finds one for the run's own microbatch, ZeRO and recompute."""
    train, parallel = config.train, config.parallel
    wishes = Wishes(
        zero=parallel.zero, recompute=train.recompute, microbatch_size=train.microbatch_size
    )
    try:
        best = search(job_of(config, spec), machine.cluster(workers), wishes).best.choice
        layout = best.layout
        yield dataclasses.replace(
            parallel,
            dp=layout.dp,
            tp=layout.tp,
            pp=layout.pp,
            ep=layout.ep,
            schedule=best.schedule,
            chunks=layout.chunks,
            chunk_layers=(),
        )
    except LayoutError:
        return


def _nearest_first(asked: ParallelConfig, workers: int) -> Iterator[ParallelConfig]:
    choices = [
        (tp, pp, ep, dp)
        for tp in divisors(asked.tp)
        for pp in divisors(asked.pp)
        for dp in range(1, workers // (tp * pp) + 1)
        for ep in divisors(asked.ep)
    ]
    for tp, pp, ep, dp in sorted(choices, reverse=True):
        same_stages = pp == asked.pp
        try:
            parallel = dataclasses.replace(
                asked,
                dp=dp,
                tp=tp,
                pp=pp,
                ep=ep,
                schedule=asked.schedule if same_stages else "1f1b",
                chunks=asked.chunks if same_stages else 1,
                chunk_layers=asked.chunk_layers if same_stages else (),
            )
            parallel.layout()
        except LayoutError:
            continue
        yield parallel


def _valid(config: TrainConfig, spec: ModelSpec, parallel: ParallelConfig) -> TrainConfig | None:
    try:
        smaller = dataclasses.replace(config, parallel=parallel)
        smaller.check_model(spec, tokenizer_vocab=0)
    except (ConfigError, LayoutError):
        return None
    return smaller
