"""How a finished model spreads validation tokens over its experts, with the routing that serves."""

from dataclasses import dataclass

import torch

from gptmoe.data import Samples
from gptmoe.model.routing import Statistics
from gptmoe.model.transformer import GPT
from gptmoe.tensors import TensorBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """One MoE layer over all tokens that it was shown."""

    layer: int
    max_over_mean: float
    """Busiest expert over the mean; 1 is even."""
    experts_per_token: float
    unrouted: float
    """Share of tokens that no expert took."""
    entropy: float
    """Of the router's distribution, mean over tokens, in nats."""


def judge_load(model: GPT, samples: Samples, batch_size: int, limit: int) -> list[LayerLoad]:
    """Route the first `limit` samples (0 = all) in evaluation and count."""
    end = min(limit or samples.num_samples, samples.num_samples)
    device = next(model.parameters()).device
    totals: dict[int, Statistics] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(0, end, batch_size):
            batch = TensorBatch.of(samples.batch(first, min(batch_size, end - first)), device)
            routings = model(batch.token_BT, valid_BT=batch.valid_BT).routings
            for layer, routing in zip(model.spec.moe_layers, routings, strict=True):
                counted = routing.statistics
                totals[layer] = totals[layer] + counted if layer in totals else counted
    model.train(was_training)
    return [_layer(layer, statistics) for layer, statistics in totals.items()]


def _layer(layer: int, statistics: Statistics) -> LayerLoad:
    load_E, tokens = statistics.load_E.double(), max(float(statistics.tokens), 1.0)
    return LayerLoad(
        layer=layer,
        max_over_mean=float(load_E.max() / load_E.mean().clamp(min=1e-9)),
        experts_per_token=float(load_E.sum()) / tokens,
        unrouted=float(statistics.unrouted) / tokens,
        entropy=float(statistics.entropy) / tokens,
    )
