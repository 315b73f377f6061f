"""What a step reports, as plain numbers by the catalogue's names (gptmoe/metrics.py)."""

import dataclasses
import resource
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gptmoe.metrics import Value
from gptmoe.model.routing import Statistics


def reduce(statistics: Statistics, sum_over_ranks: Callable[[Tensor], Tensor]) -> Statistics:
    """One layer's statistics over all ranks."""
    values = [getattr(statistics, field.name) for field in dataclasses.fields(statistics)]
    flat = torch.cat([value.double().cpu().flatten() for value in values])
    parts = sum_over_ranks(flat).split([value.numel() for value in values])
    return Statistics(*(part.view(value.shape) for part, value in zip(parts, values, strict=True)))


def expert_load(layers: Mapping[int, Statistics]) -> dict[str, Value]:
    """How evenly the experts were used in one step: over all MoE layers, and by layer."""
    ratios = [float(s.load_E.max() / s.load_E.double().mean().clamp(min=1e-9)) for s in _of(layers)]
    tokens = [max(float(s.tokens), 1.0) for s in _of(layers)]
    rows = [max(float(s.load_E.sum()), 1.0) for s in _of(layers)]
    dropped = [float(s.dropped) for s in _of(layers)]
    unrouted = [float(s.unrouted) for s in _of(layers)]
    dead = [int((s.load_E == 0).sum()) for s in _of(layers)]
    entropy = [float(s.entropy) for s in _of(layers)]
    loads = [[int(n) for n in s.load_E.tolist()] for s in _of(layers)]
    values: dict[str, Value] = {
        "load_max_over_mean": max(ratios),
        "dropped_ratio": sum(dropped) / sum(rows),
        "unrouted_ratio": sum(unrouted) / sum(tokens),
        "dead_experts": float(sum(dead)),
        "router_entropy": sum(entropy) / sum(tokens),
        "moe_layers": list(layers),
        "layer_expert_load": loads,
        "layer_load_max_over_mean": ratios,
        "layer_dropped_ratio": [d / r for d, r in zip(dropped, rows, strict=True)],
        "layer_unrouted_ratio": [u / t for u, t in zip(unrouted, tokens, strict=True)],
        "layer_dead_experts": dead,
        "layer_router_entropy": [e / t for e, t in zip(entropy, tokens, strict=True)],
    }
    if len({len(load) for load in loads}) == 1:
        values["expert_load"] = [sum(column) for column in zip(*loads, strict=True)]
    return values


def _of(layers: Mapping[int, Statistics]) -> list[Statistics]:
    return list(layers.values())


def speed(
    tokens: int, began_s: float, data_wait_s: float, exchange_s: float | None
) -> dict[str, Value]:
    """Time and throughput of one step, and how much of it went into exchanging rows."""
    step_s = time.perf_counter() - began_s
    values: dict[str, Value] = {
        "step_s": step_s,
        "data_wait_s": data_wait_s,
        "tokens_per_s": tokens / step_s,
        "memory_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if exchange_s is not None:
        values["all_to_all_share"] = exchange_s / step_s
    return values


def position(step: int, batch_sequences: int, seq_len: int, num_samples: int) -> dict[str, Value]:
    """Where the run is in its data after `step` steps."""
    samples = step * batch_sequences
    return {"tokens": samples * seq_len, "samples": samples, "epoch": samples // num_samples}
