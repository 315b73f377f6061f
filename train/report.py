"""What a step reports, as plain numbers by the catalogue's names (gptmoe/metrics.py)."""

import resource
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptmoe.model.routing import Statistics

Value = float | Sequence[float]


def reduce(statistics: Statistics, sum_over_ranks: Callable[[Tensor], Tensor]) -> Statistics:
    """One layer's statistics over all ranks."""
    scalars = [statistics.dropped, statistics.tokens, statistics.entropy]
    flat = torch.cat(
        [statistics.load_E.double().cpu(), torch.stack([x.double().cpu() for x in scalars])]
    )
    total = sum_over_ranks(flat)
    return Statistics(total[:-3], total[-3], total[-2], total[-1])


def expert_load(layers: Sequence[Statistics]) -> dict[str, Value]:
    """How evenly the experts were used, over the MoE layers of one step."""
    ratios = [float(s.load_E.max() / s.load_E.double().mean().clamp(min=1e-9)) for s in layers]
    tokens = float(sum(s.tokens for s in layers))
    same_size = len({len(s.load_E) for s in layers}) == 1
    values: dict[str, Value] = {
        "load_max_over_mean": max(ratios),
        "dropped_ratio": float(sum(s.dropped for s in layers)) / max(tokens, 1.0),
        "dead_experts": float(sum(int((s.load_E == 0).sum()) for s in layers)),
        "router_entropy": float(sum(s.entropy for s in layers)) / max(tokens, 1.0),
    }
    if same_size:
        values["expert_load"] = [
            int(n) for n in torch.stack([s.load_E for s in layers]).sum(0).tolist()
        ]
    return values


def speed(tokens: int, began_s: float, data_wait_s: float) -> dict[str, Value]:
    """Time and throughput of one step."""
    step_s = time.perf_counter() - began_s
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "step_s": step_s,
        "data_wait_s": data_wait_s,
        "tokens_per_s": tokens / step_s,
        "memory_peak_bytes": peak_bytes,
    }


def position(step: int, batch_sequences: int, seq_len: int, num_samples: int) -> dict[str, Value]:
    """Where the run is in its data after `step` steps."""
    samples = step * batch_sequences
    return {"tokens": samples * seq_len, "samples": samples, "epoch": samples // num_samples}
