"""Bytes that one rank needs, item by item.

Sources: weights, gradients and optimizer state by Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054,
section 3), activations by Korthikanti et al. 2022 (arXiv 2205.05198, section 4), both adapted to
what our training keeps: float32 weights that are cast where they are used, norms in float32, a
GELU feed-forward layer of any width, rows of experts, logits in float32.
"""

from dataclasses import dataclass, fields

from gptmoe.model.spec import ModelSpec

from .job import Choice, Job
from .stages import Stage, unlike_stages

WEIGHT_BYTES = GRADIENT_BYTES = COPY_BYTES = 4
MOMENT_BYTES = 8
CAST_BYTES = 2
BUCKET_BYTES = 32 * 2**20
"""Gradients are reduced in buckets of this size, as in gptmoe/parallel/updater.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the fullest rank of one stage."""

    weights: float
    gradients: float
    moments: float
    """Adam's two averages."""
    master_copy: float
    """ZeRO's own flat float32 copy of the part that a rank updates."""
    cast_weights: float
    """Weights in the type of the products, which the backward pass wants to see again. With ZeRO 3
    it gathers them again: the largest one."""
    activations: float
    """Kept from the forward to the backward pass, of all microbatches in flight."""
    working: float
    """Of the layer at work: what is computed again, and gradients of its activations."""
    logits: float
    """Scores over the vocabulary with their gradient, on the last stage."""
    buffers: float
    """Buckets of gradients under way. With ZeRO 3 the whole gradient of the largest weight."""

    @property
    def total(self) -> float:
        passing = self.activations + self.working + self.logits + self.buffers
        return self.state + self.cast_weights + passing

    @property
    def state(self) -> float:
        """What no microbatch, schedule or recompute changes."""
        return self.weights + self.gradients + self.moments + self.master_copy

    def items(self) -> dict[str, float]:
        """By name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def largest(self) -> str:
        """The name of the largest item."""
        items = self.items()
        return max(items, key=items.__getitem__)


def fullest(job: Job, choice: Choice) -> Memory:
    """Of the stage that needs most."""
    every = [
        stage_memory(job, choice, stage)
        for stage in unlike_stages(job.spec, choice.layout.pp, choice.layout.chunks)
    ]
    return max(every, key=lambda memory: memory.total)


def stage_memory(job: Job, choice: Choice, stage: Stage) -> Memory:
    """Of one rank of `stage`."""
    layout, zero = choice.layout, choice.zero
    dense = stage.sliced / layout.tp + stage.whole
    expert = stage.expert / layout.ep
    replicas = layout.expert_span // layout.ep
    own, shared = dense + expert, dense / layout.dp + expert / replicas
    flight = in_flight(job, choice, stage.index)
    layer = _largest_layer(job, choice, stage)
    return Memory(
        weights=WEIGHT_BYTES * (shared if zero == 3 else own),
        gradients=GRADIENT_BYTES * (shared if zero >= 2 else own),
        moments=MOMENT_BYTES * (shared if zero else own),
        master_copy=COPY_BYTES * shared if zero in (1, 2) else 0.0,
        cast_weights=_cast_weights(job, choice, stage, own, flight),
        activations=flight * _kept(job, choice, stage),
        working=_gradients_of_activations(job, choice)
        + (layer if choice.recompute == "full" else 0.0),
        logits=_logits(job, choice) if stage.last else 0.0,
        buffers=_buffers(job, choice, replicas if expert else 1),
    )


def in_flight(job: Job, choice: Choice, stage: int) -> float:
    """Microbatches whose activations a stage holds at once; with chunks, a fraction of one counts.

    GPipe: all. 1F1B: those of the stages after it, and one. Interleaved: Narayanan et al. 2021
    (arXiv 2104.04473, section 2.2), first stage: 1 + (pp - 1) / (pp v) times those of 1F1B.
    """
    microbatches = choice.microbatches(job)
    pp, chunks = choice.layout.pp, choice.layout.chunks
    if choice.schedule == "gpipe":
        return microbatches
    if choice.schedule == "interleaved":
        pieces = 2 * (pp - stage - 1) + (chunks - 1) * pp + 1
        return min(microbatches, pieces / chunks)
    return min(microbatches, pp - stage)


def layer_bytes(job: Job, choice: Choice, num_experts: int) -> float:
    """What one layer keeps of one microbatch without recompute.

    The input of both norms (float32), their outputs, q, k, v, the answer of attention; then the
    feed-forward layer's middle before and after GELU, or the rows of experts and the router.
    """
    spec, width = job.spec, job.width_bytes
    tokens = choice.microbatch_size * job.seq_len / choice.layout.tp
    kept = tokens * spec.d_model * (2 * 4 + 2 * width + 3 * width + width)
    if spec.dropout:
        kept += 2 * tokens * spec.d_model  # masks
    if num_experts:
        rows = tokens * row_bound(spec, choice.layout.ep, num_experts, job.seq_len)
        kept += rows * width * (2 * spec.d_model + 2 * spec.d_ff)
        kept += 4 * tokens * (spec.d_model + 2 * num_experts)  # the router works in float32
        each = 4 * spec.d_model + width * (2 * spec.d_model + 2 * spec.d_ff)
        kept += spec.shared_layers * tokens * each  # what goes in, its norm, what comes out
    else:
        kept += tokens * width * 2 * spec.d_ff
    return kept


def core_bytes(job: Job, choice: Choice) -> float:
    """What the core of attention keeps of one microbatch, per layer.

    The probabilities, or where attention is fused one float32 number a query and head.
    """
    tokens = choice.microbatch_size * job.seq_len / choice.layout.tp
    wide = 4 if job.fused_attention else job.seq_len * job.width_bytes
    return tokens * job.spec.num_heads * wide


def row_bound(spec: ModelSpec, ep: int, num_experts: int, seq_len: int) -> float:
    """Rows that an expert rank can get, over its tokens: the capacity bounds it.

    Experts that choose get what they choose; once thresholds decide in their place, about as many.
    """
    router = spec.router
    if router.kind == "expert_choice":
        return min(router.capacity_factor, float(num_experts))
    if ep == 1:
        return float(router.choices)
    group_tokens = router.group_sequences * seq_len
    least = router.min_capacity * num_experts / group_tokens
    return min(float(ep * router.choices), max(router.choices * router.capacity_factor, least))


def _kept(job: Job, choice: Choice, stage: Stage) -> float:
    """Activations of one microbatch that wait for the backward pass."""
    if choice.recompute == "full":
        tokens = choice.microbatch_size * job.seq_len / choice.layout.tp
        return stage.layers * tokens * job.spec.d_model * job.width_bytes
    kept = stage.dense_layers * layer_bytes(job, choice, 0) if stage.dense_layers else 0.0
    for count in set(stage.experts):
        kept += stage.experts.count(count) * layer_bytes(job, choice, count)
    if choice.recompute == "none":
        kept += stage.layers * core_bytes(job, choice)
    return kept


def _largest_layer(job: Job, choice: Choice, stage: Stage) -> float:
    kinds = set(stage.experts) | ({0} if stage.dense_layers else set())
    return max(layer_bytes(job, choice, kind) for kind in kinds) + core_bytes(job, choice)


def _gradients_of_activations(job: Job, choice: Choice) -> float:
    """Of the widest pair of tensors of a layer."""
    spec = job.spec
    tokens = choice.microbatch_size * job.seq_len / choice.layout.tp
    return 2 * tokens * job.width_bytes * max(spec.d_ff, 3 * spec.d_model)


def _cast_weights(job: Job, choice: Choice, stage: Stage, own: float, flight: float) -> float:
    """Autograd keeps the narrow copy of each pass's weights; recompute keeps one layer's only."""
    if choice.zero == 3:
        return job.width_bytes * _largest_matrix(job.spec)
    if job.dtype == "float32":
        return 0.0
    if choice.recompute == "full":
        dense, expert = stage.largest_layer
        return CAST_BYTES * (dense / choice.layout.tp + expert / choice.layout.ep)
    return CAST_BYTES * own * max(flight, 1.0)


def _buffers(job: Job, choice: Choice, replicas: int) -> float:
    if choice.zero == 3:  # as it is computed, then in float32 to be summed
        return (job.width_bytes + GRADIENT_BYTES) * _largest_matrix(job.spec)
    if choice.layout.dp == 1 and replicas == 1:
        return 0.0
    return BUCKET_BYTES * (2 if choice.zero else 1)


def _largest_matrix(spec: ModelSpec) -> int:
    return spec.d_model * max(spec.vocab_size, spec.d_ff, 3 * spec.d_model)


def _logits(job: Job, choice: Choice) -> float:
    """In the type of the products, in float32 after the softmax, and their gradient in float32."""
    tokens = choice.microbatch_size * job.seq_len
    return tokens * job.spec.vocab_size / choice.layout.tp * (job.width_bytes + 4 + 4)
