"""Whether a rank's part of a run fits where it is to run, before any of it is allocated."""

import dataclasses
from collections.abc import Iterator

import torch

from cluster.planner.devices import CPU, MACHINES, Machine
from cluster.planner.job import Choice, Job
from cluster.planner.memory import Memory, fullest
from gptmoe.errors import ConfigError, LayoutError
from gptmoe.memory import available_bytes
from gptmoe.model.spec import ModelSpec

from .config import TrainConfig

GIGA = 1e9


def check_fits(
    config: TrainConfig, spec: ModelSpec, free_bytes: float | None, *, elsewhere: bool = False
) -> None:
    """Raise ConfigError if the fullest rank needs more than `free_bytes`; None = nobody knows.

    `elsewhere`: what is offloaded lies in other memory than that. The message names the largest
    item and the nearest change that would fit.
    """
    need = predicted(config, spec, elsewhere=elsewhere)
    if free_bytes is None or need.total <= free_bytes:
        return
    name = need.largest
    raise ConfigError(
        f"not enough memory: a rank needs {need.total / GIGA:.1f} GB and has "
        f"{free_bytes / GIGA:.1f}; the largest item is {name.replace('_', ' ')} with "
        f"{need.items()[name] / GIGA:.1f} GB; {_advice(config, spec, free_bytes, elsewhere)}"
    )


def predicted(config: TrainConfig, spec: ModelSpec, *, elsewhere: bool = False) -> Memory:
    """What the fullest rank of a run needs, item by item; without what is offloaded `elsewhere`."""
    choice = Choice(
        layout=config.parallel.layout(),
        microbatch_size=config.train.microbatch_size,
        zero=config.parallel.zero,
        recompute=config.train.recompute,
        schedule=config.parallel.schedule,
    )
    need = fullest(job_of(config, spec), choice)
    if elsewhere and config.parallel.offload:
        return dataclasses.replace(need, weights=0.0, gradients=0.0, moments=0.0)
    return need


def job_of(config: TrainConfig, spec: ModelSpec) -> Job:
    """What the run trains, as the planner wants to know it."""
    return Job(
        spec=spec,
        batch_sequences=config.batch_sequences,
        seq_len=config.data.seq_len,
        dtype="float32" if config.train.dtype == "float32" else "bfloat16",
    )


def machine_here(device: torch.device, ranks_here: int) -> Machine:
    """A rank's device as the planner knows it, with the memory that is free now."""
    machine = CPU
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        known = [m for m in MACHINES.values() if m.device.name.partition("-")[0] in name]
        machine = known[-1] if known else MACHINES["a100-80gb"]
    free = free_bytes(device, ranks_here)
    if free is None:
        return machine
    memory_bytes = free + machine.device.runtime_bytes
    return dataclasses.replace(
        machine, device=dataclasses.replace(machine.device, memory_bytes=memory_bytes)
    )


def free_bytes(device: torch.device, ranks_here: int) -> float | None:
    """Memory that one of `ranks_here` ranks of a machine may use; None where it cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    available = available_bytes()
    return None if available is None else available / ranks_here


def _advice(config: TrainConfig, spec: ModelSpec, free: float, elsewhere: bool) -> str:
    for words, changed in _changes(config):
        try:
            changed.check_model(spec, tokenizer_vocab=0)
        except (ConfigError, LayoutError):
            continue
        if predicted(changed, spec, elsewhere=elsewhere).total <= free:
            return f"it would fit with {words}"
    return "use more devices (gptmoe plan says how many), larger ones, or a smaller model"


def _changes(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Small changes first: what costs time, then what costs devices."""
    group, parallel = config.router.group_sequences, config.parallel
    yield from _changed(config, "train", recompute="sel")
    yield from _changed(config, "train", recompute="full")
    yield from _changed(config, "train", microbatch_size=group, recompute="full")
    yield from _changed(config, "parallel", zero=1)
    yield from _changed(config, "parallel", zero=3)
    yield from _changed(config, "parallel", zero=3, offload=True)
    for more in (2, 4, 8):
        yield from _changed(config, "parallel", ep=parallel.ep * more)
        yield from _changed(config, "parallel", tp=parallel.tp * more)
        yield from _changed(config, "parallel", pp=parallel.pp * more)


def _changed(
    config: TrainConfig, table: str, **values: object
) -> Iterator[tuple[str, TrainConfig]]:
    words = " ".join(f"{table}.{key}={value}" for key, value in values.items())
    if "ep" in values:
        values = values | {"dp": None}
    try:
        part = dataclasses.replace(getattr(config, table), **values)
        yield words, dataclasses.replace(config, **{table: part})
    except (ConfigError, LayoutError):
        return
