"""Seconds of a rank's own work on one microbatch, and of its optimizer step.

A roofline by parts: products run at a share of the peak rate, everything else moves bytes at a
share of the memory's rate, and no layer is faster than its kernels can be started. Small models
come out slow by themselves: products shrink with the square of the width, the rest with the width.

Operations of products: Narayanan et al. 2021 (arXiv 2104.04473, appendix), for any d_ff.
"""

from .assumptions import Assumptions
from .devices import Device
from .job import Choice, Job
from .memory import core_bytes, layer_bytes
from .stages import Stage, unlike_stages

FORWARD, BACKWARD = 1, 2
"""A backward pass multiplies twice what a forward pass does."""

LOGIT_BYTES = 24
"""Moved for each score besides its narrow copies: float32 copy, softmax, loss, gradient."""

OPTIMIZER_BYTES = 36
"""Moved for each parameter by Adam: weight, gradient, both moments, their writes, the norm."""


def layer_flops(job: Job, num_experts: int) -> float:
    """Operations of the products of one layer for one token, forward, attention's core apart."""
    spec = job.spec
    attention = 8 * spec.d_model**2
    return attention + 4 * spec.d_model * spec.d_ff + 2 * spec.d_model * num_experts


def core_flops(job: Job) -> float:
    """Of attention's core: queries times keys, probabilities times values, all positions."""
    return 4.0 * job.spec.d_model * job.seq_len


def model_flops_per_token(job: Job) -> float:
    """Forward and backward, without recompute: what utilisation (MFU) is measured by."""
    spec = job.spec
    layers = sum(
        layer_flops(job, spec.experts_in_layer(layer)) + core_flops(job)
        for layer in range(spec.num_layers)
    )
    return (FORWARD + BACKWARD) * (layers + 2.0 * spec.d_model * spec.vocab_size)


def microbatch_s(
    job: Job, choice: Choice, stage: Stage, device: Device, assumptions: Assumptions
) -> float:
    """Forward and backward pass of one microbatch through a stage, without communication."""
    seconds = 0.0
    kinds = {0: stage.dense_layers} if stage.dense_layers else {}
    for count in stage.experts:
        kinds[count] = kinds.get(count, 0) + 1
    for num_experts, layers in kinds.items():
        seconds += layers * _layer_s(job, choice, num_experts, device, assumptions)
    if stage.last:
        seconds += _head_s(job, choice, device, assumptions)
    return seconds


def optimizer_s(
    job: Job, choice: Choice, stage: Stage, device: Device, assumptions: Assumptions
) -> float:
    """Norm, clipping and Adam over the parameters that a rank updates."""
    layout = choice.layout
    dense, expert = stage.sliced / layout.tp + stage.whole, stage.expert / layout.ep
    if choice.zero:
        dense /= layout.dp
        expert /= layout.expert_span / layout.ep
    moved = OPTIMIZER_BYTES * (dense + expert)
    return moved / (device.memory_bytes_per_s * assumptions.memory_efficiency)


def slowest(job: Job, choice: Choice, device: Device, assumptions: Assumptions) -> Stage:
    """The stage that computes longest, which all others wait for."""
    every = unlike_stages(job.spec, choice.layout.pp, choice.chunks)
    if len(every) == 1:
        return every[0]
    return max(every, key=lambda stage: microbatch_s(job, choice, stage, device, assumptions))


def _layer_s(
    job: Job, choice: Choice, num_experts: int, device: Device, assumptions: Assumptions
) -> float:
    layout, spec = choice.layout, job.spec
    tokens = choice.microbatch_size * job.seq_len / layout.tp
    products = layer_flops(job, num_experts)
    if num_experts and layout.ep > 1:
        products += (assumptions.expert_imbalance - 1) * 4 * spec.d_model * spec.d_ff
    times = FORWARD + BACKWARD + (FORWARD if choice.recompute == "full" else 0)
    core_times = FORWARD + BACKWARD + (FORWARD if choice.recompute != "none" else 0)
    flops = tokens * (times * products + core_times * core_flops(job))
    rate = device.flops_per_s(job.dtype) * assumptions.product_efficiency
    moved = _moved_bytes(job, choice, num_experts, assumptions)
    seconds = flops / rate + moved / (device.memory_bytes_per_s * assumptions.memory_efficiency)
    kernels = assumptions.layer_kernels + (assumptions.moe_kernels if num_experts else 0)
    return max(seconds, kernels * device.kernel_s)


def _moved_bytes(
    job: Job, choice: Choice, num_experts: int, assumptions: Assumptions
) -> float:
    """Bytes that cross the memory for one layer besides the inner loops of its products."""
    layer, core = layer_bytes(job, choice, num_experts), core_bytes(job, choice)
    moved = assumptions.passes * (layer + core)
    if choice.recompute == "full":
        moved += assumptions.recompute_passes * (layer + core)
    elif choice.recompute == "sel":
        moved += assumptions.recompute_passes * core
    spec, layout = job.spec, choice.layout
    ffn = 2 * spec.d_model * spec.d_ff
    weights = 4 * spec.d_model**2 / layout.tp
    weights += num_experts * ffn / layout.ep if num_experts else ffn / layout.tp
    return moved + weights * _weight_bytes(job, choice)


def _weight_bytes(job: Job, choice: Choice) -> float:
    """Moved for each weight by one microbatch: cast and read, read again, its gradient added."""
    cast = 4 + 2 * job.width_bytes if job.dtype == "bfloat16" else 4
    backward = job.width_bytes + 2 * job.width_bytes + 2 * 4
    return cast * (2 if choice.recompute == "full" else 1) + backward


def _head_s(job: Job, choice: Choice, device: Device, assumptions: Assumptions) -> float:
    """The output head and the loss."""
    spec = job.spec
    scores = choice.microbatch_size * job.seq_len * spec.vocab_size / choice.layout.tp
    flops = (FORWARD + BACKWARD) * 2.0 * spec.d_model * scores
    rate = device.flops_per_s(job.dtype) * assumptions.product_efficiency
    moved = scores * (LOGIT_BYTES + 4 * job.width_bytes)
    return flops / rate + moved / (device.memory_bytes_per_s * assumptions.memory_efficiency)
