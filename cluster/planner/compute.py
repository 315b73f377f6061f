"""Seconds of a rank's own work on one microbatch, and of its optimizer step.

A roofline by parts: products run at a share of the peak rate, everything else moves bytes at a
share of the memory's rate, and no layer is faster than its kernels can be started. Small models
come out slow by themselves: products shrink with the square of the width, the rest with the width.

Operations of products: Narayanan et al. 2021 (arXiv 2104.04473, appendix), for any d_ff.
"""

from gptmoe.model.spec import ModelSpec

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
    ffn = 4 * spec.d_model * spec.d_ff
    layer = 8 * spec.d_model**2 + expert_rows(spec, num_experts) * ffn
    if not num_experts:
        return layer
    mix = 4 * spec.d_model if spec.residual_moe else 0
    return layer + 2 * spec.d_model * num_experts + spec.shared_layers * ffn + mix


def expert_rows(spec: ModelSpec, num_experts: int) -> float:
    """Passes of a token through a feed-forward layer that experts share; 1 in a dense layer."""
    return min(spec.router.rows_per_token, num_experts) if num_experts else 1.0


def core_flops(job: Job) -> float:
    """Of attention's core: queries times keys, probabilities times values, all positions."""
    return 4.0 * job.spec.d_model * job.seq_len


def model_flops_per_token(job: Job) -> float:
    """Forward and backward, without recompute: what utilisation (MFU) is measured by."""
    spec = job.spec
    mixtures = sum(layer_flops(job, count) for count in spec.num_experts)
    dense = (spec.num_layers - len(spec.num_experts)) * layer_flops(job, 0)
    layers = mixtures + dense + spec.num_layers * core_flops(job)
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
    every = unlike_stages(job.spec, choice.layout.pp, choice.layout.chunks)
    if len(every) == 1:
        return every[0]
    return max(every, key=lambda stage: microbatch_s(job, choice, stage, device, assumptions))


def _layer_s(
    job: Job, choice: Choice, num_experts: int, device: Device, assumptions: Assumptions
) -> float:
    """One layer: attention, and a dense feed-forward layer or experts."""
    spec, layout = job.spec, choice.layout
    tokens = choice.microbatch_size * job.seq_len / layout.tp
    times = FORWARD + BACKWARD + (FORWARD if choice.recompute == "full" else 0)
    core_times = FORWARD + BACKWARD + (FORWARD if choice.recompute != "none" else 0)
    rate = device.flops_per_s(job.dtype) * assumptions.product_efficiency
    memory_rate = device.memory_bytes_per_s * assumptions.memory_efficiency

    def products_s(flops_per_token: float, weights: float) -> float:
        """Few tokens do not pay for reading the weights: then that is the bound."""
        read = job.width_bytes * weights / memory_rate
        return times * max(tokens * flops_per_token / rate, read)

    ffn_weights = 2.0 * spec.d_model * spec.d_ff
    ffn_flops = 2 * ffn_weights * expert_rows(spec, num_experts)
    common_weights = 4.0 * spec.d_model**2 / layout.tp
    if num_experts:
        common_weights += spec.shared_layers * ffn_weights / layout.tp
    seconds = products_s(layer_flops(job, num_experts) - ffn_flops, common_weights)
    if num_experts:
        uneven = assumptions.expert_imbalance if layout.ep > 1 else 1.0
        ffn_weights *= num_experts / layout.ep
        seconds += products_s(ffn_flops * uneven, ffn_weights)
    else:
        ffn_weights /= layout.tp
        seconds += products_s(ffn_flops, ffn_weights)
    seconds += core_times * tokens * core_flops(job) / rate
    moved = _moved_bytes(job, choice, num_experts, assumptions)
    moved += (common_weights + ffn_weights) * _cast_bytes(job, choice, assumptions)
    kernels = assumptions.layer_kernels + (assumptions.moe_kernels if num_experts else 0)
    return max(seconds + moved / memory_rate, kernels * device.kernel_s)


def _moved_bytes(job: Job, choice: Choice, num_experts: int, assumptions: Assumptions) -> float:
    """Bytes that cross the memory for the activations of one layer, outside its products."""
    layer, core = layer_bytes(job, choice, num_experts), core_bytes(job, choice)
    moved = assumptions.passes * (layer + core)
    if choice.recompute == "full":
        moved += assumptions.recompute_share * assumptions.passes * (layer + core)
    elif choice.recompute == "sel":
        moved += assumptions.recompute_share * assumptions.passes * core
    return moved


def _cast_bytes(job: Job, choice: Choice, assumptions: Assumptions) -> float:
    """Moved for each weight by one microbatch besides the products' own reading.

    Read wide and written narrow for each pass forward; the gradient written, read, and added.
    """
    if assumptions.narrow_weights:
        return 2 * 4.0  # the products add to a float32 gradient
    passes = 2 if choice.recompute == "full" else 1
    cast = passes * (4 + job.width_bytes) if job.dtype == "bfloat16" else 0
    return cast + 2 * job.width_bytes + 2 * 4.0


def _head_s(job: Job, choice: Choice, device: Device, assumptions: Assumptions) -> float:
    """The output head and the loss."""
    spec = job.spec
    scores = choice.microbatch_size * job.seq_len * spec.vocab_size / choice.layout.tp
    flops = (FORWARD + BACKWARD) * 2.0 * spec.d_model * scores
    rate = device.flops_per_s(job.dtype) * assumptions.product_efficiency
    moved = scores * (LOGIT_BYTES + 4 * job.width_bytes)
    return flops / rate + moved / (device.memory_bytes_per_s * assumptions.memory_efficiency)
