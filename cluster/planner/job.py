"""What is to be trained, and one way to do it."""

from dataclasses import dataclass
from typing import Literal

from gptmoe.errors import LayoutError
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.layout import Layout, choices, divisors
from gptmoe.parallel.schedules import Kind, schedule

from .devices import Dtype

Recompute = Literal["none", "sel", "full"]

RECOMPUTES: tuple[Recompute, ...] = ("none", "sel", "full")
"""From most memory to least: nothing, the core of attention, whole layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model and a batch."""

    spec: ModelSpec
    batch_sequences: int
    """Sequences of one optimizer step over all ranks."""
    seq_len: int
    dtype: Dtype = "bfloat16"
    """Type of the products; weights, gradients and moments are float32."""
    fused_attention: bool = True
    """Whether attention's scores never reach memory; see Device."""

    def __post_init__(self) -> None:
        if self.batch_sequences < 1:
            raise LayoutError(
                f"train.batch_tokens holds {self.batch_sequences} sequences of "
                f"data.seq_len={self.seq_len}; give at least one whole sequence"
            )
        if not 2 <= self.seq_len <= self.spec.max_seq_len:
            raise LayoutError(
                f"data.seq_len={self.seq_len} must be 2 to the model's max_seq_len="
                f"{self.spec.max_seq_len}"
            )

    @property
    def batch_tokens(self) -> int:
        return self.batch_sequences * self.seq_len

    @property
    def width_bytes(self) -> int:
        """Bytes of one activation."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def least_sequences(self) -> int:
        """Sequences of the smallest microbatch: those of a routing group stay together."""
        return self.spec.router.group_sequences if self.spec.num_experts else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to train a job: everything that the planner decides."""

    layout: Layout
    microbatch_size: int
    """Sequences of one pass of a rank."""
    zero: int = 0
    recompute: Recompute = "none"
    schedule: Kind = "1f1b"

    def microbatches(self, job: Job) -> int:
        """How many of them make a rank's share of the batch."""
        return job.batch_sequences // (self.layout.dp * self.microbatch_size)

    def __str__(self) -> str:
        layout = self.layout
        words = [f"dp={layout.dp} tp={layout.tp} ep={layout.ep} pp={layout.pp}"]
        words.append(f"zero={self.zero} recompute={self.recompute}")
        words.append(f"microbatch_size={self.microbatch_size}")
        if layout.pp > 1:
            words.append(f"{self.schedule}" + (f" x{layout.chunks}" if layout.chunks > 1 else ""))
        return " ".join(words)


def tensor_sizes(job: Job) -> list[int]:
    """The numbers of tensor-parallel ranks that cut heads, d_ff and the sequence evenly."""
    spec = job.spec
    return [tp for tp in divisors(spec.num_heads) if spec.d_ff % tp == 0 and job.seq_len % tp == 0]


def check(job: Job, choice: Choice) -> None:
    """Raise LayoutError, with both numbers and what would do, unless `choice` can train `job`."""
    layout = choice.layout
    _check_tensor(job, layout.tp)
    layout.check_model(job.spec)
    _check_batch(job, choice)
    schedule(choice.schedule, layout.pp, 0, choice.microbatches(job), layout.chunks)
    _check_zero(job, choice)


def _check_tensor(job: Job, tp: int) -> None:
    good = tensor_sizes(job)
    if tp not in good:
        raise LayoutError(
            f"parallel.tp={tp} must divide num_heads={job.spec.num_heads}, "
            f"d_ff={job.spec.d_ff} and seq_len={job.seq_len}; use {choices(good)}"
        )


def _check_batch(job: Job, choice: Choice) -> None:
    dp, size, least = choice.layout.dp, choice.microbatch_size, job.least_sequences
    if size < 1 or size % least:
        raise LayoutError(
            f"microbatch_size={size} must be a multiple of router.group_sequences={least}, whose "
            f"sequences share the experts' capacity; use {least}"
            if least > 1
            else f"microbatch_size={size} must be at least 1; use 1"
        )
    if job.batch_sequences % (dp * size):
        good = [n for n in divisors(job.batch_sequences) if job.batch_sequences % (n * size) == 0]
        advice = f"use dp {choices(good)}" if good else "use a smaller microbatch_size"
        raise LayoutError(
            f"dp={dp} x microbatch_size={size} must divide the batch of {job.batch_sequences} "
            f"sequences; {advice}, or another batch"
        )


def _check_zero(job: Job, choice: Choice) -> None:
    zero, layout = choice.zero, choice.layout
    if not 0 <= zero <= 3:
        raise LayoutError(f"parallel.zero={zero} is not known; use 0, 1, 2 or 3")
    if zero == 2 and layout.pp > 1:
        raise LayoutError(
            f"parallel.zero=2 splits gradients, which parallel.pp={layout.pp} stages add up "
            "over microbatches; use zero 0 or 1, or pp=1"
        )
    if zero == 3 and (job.spec.num_experts or layout.tp > 1 or layout.pp > 1):
        raise LayoutError(
            f"parallel.zero=3 is for dense models with dp alone, found tp={layout.tp}, "
            f"pp={layout.pp} and {len(job.spec.moe_layers)} layers with experts; use zero 0 or 1"
        )
