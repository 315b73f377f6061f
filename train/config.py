"""What a training run is: the tables of a file in configs/train/, checked and resolved.

`resolved` fills in what presets and the tokenizer decide; each checkpoint stores the result.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptmoe.config import INPUT_PATH, Location
from gptmoe.errors import ConfigError
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.schedules import schedule

from .model_config import ModelConfig
from .parallel_config import ParallelConfig
from .schedule import ScheduleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where the run lives and what it draws from."""

    dir: Path
    """Its folder, for metrics.jsonl, config.json, checkpoints/ and tensorboard/. Started again, it
    goes on from there."""
    seed: int = 0
    max_failures: int = 8
    """So often the workers start again by themselves after one was lost; -1 = always."""
    hang_s: float = 600.0
    """A worker that has made no progress for so long is taken for hung and ended; 0 = never."""
    slow_factor: float = 3.0
    """A worker whose products take so many times as long as the others' for `slow_s` is named, and
    all start again from a new checkpoint, at most once an hour; 0 = never."""
    slow_s: float = 120.0
    refresh: str = ""
    """HOST:PORT of a deployment's gRPC that gets the new weights after each validation that
    improves; they are saved at once, and what is served is kept in the folder `served`."""

    def __post_init__(self) -> None:
        scheme = re.match(r"([a-z][a-z0-9+.-]+):/", str(self.dir))
        if scheme:
            raise ConfigError(
                f"run.dir begins with {scheme[1]}://, but a run is written to a folder: its "
                "checkpoints are committed by a rename and served through memory maps, which an "
                "object store has not; mount it, or name a folder that all nodes share"
            )
        for name, least in (("seed", 0), ("max_failures", -1), ("hang_s", 0), ("slow_s", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"run.{name}={getattr(self, name)} must be at least {least}")
        if self.slow_factor and not self.slow_factor > 1:
            raise ConfigError(f"run.slow_factor={self.slow_factor} must be 0 or above 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is learned from: a folder that `gptmoe data prepare` made or raw files, or URIs."""

    path: Location = field(metadata=INPUT_PATH)
    tokenizer: Location | None = field(default=None, metadata=INPUT_PATH)
    """A tokenizer.json or a folder that holds a tokenizer; default: that of model.checkpoint."""
    seq_len: int
    """Tokens of one sample."""
    validation_path: Location | None = field(default=None, metadata=INPUT_PATH)
    validation_fraction: float = 0.02
    """Share of the documents kept for validation where no validation_path is given."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names for the file's columns, as columns.src_txt="text1"."""
    sep_text: str = ""
    """Text in src_txt that stands for <sep>, such as "[SEP]" (finetuning)."""
    workers: int = 2
    """Processes that tokenize."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ConfigError(f"data.seq_len={self.seq_len} must be at least 2")
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers} must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How long, how much at once, in what precision."""

    max_steps: int | None = None
    """Optimizer steps in all; may be raised when a run goes on."""
    epochs: float | None = None
    """Passes over the training samples; with max_steps too, the run ends at the earlier."""
    batch_tokens: int | None = None
    """Tokens of one optimizer step over all ranks, whole sequences of data.seq_len; default: the
    preset's."""
    microbatch_size: int = 8
    """Sequences of one pass forward and backward of a rank; whole router.group_sequences."""
    copies: int = 1
    """Parts of a microbatch that take turns: one computes while the other's rows travel to experts
    (the "multi-copy" of Rapidformer). Each is whole router.group_sequences."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the products; weights and optimizer stay float32. float16 scales the loss."""
    recompute: Literal["none", "sel", "full"] = "none"
    """What the backward pass computes again to save memory: sel the attention core, full layers."""
    validate_every_steps: int = 100
    """0 = only at the end of each epoch and of the run."""
    validation_samples: int = 2048
    """At most so many samples a validation; 0 = all."""

    def __post_init__(self) -> None:
        if self.max_steps is None and self.epochs is None:
            raise ConfigError(
                "train.max_steps or train.epochs must be given; "
                "with both the run ends at the earlier"
            )
        for name in ("max_steps", "epochs", "batch_tokens", "microbatch_size", "copies"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"train.{name}={value} must be above 0")
        for name in ("validate_every_steps", "validation_samples"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int = 500
    """Besides the end of the run; 0 = only there."""
    keep: int = 3
    """The newest so many are kept."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ConfigError(f"checkpoint.every_steps={self.every_steps} must be at least 0")
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep={self.keep} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A whole training run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: LoopConfig
    router: RouterSpec = field(default_factory=RouterSpec)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        tokens, dp = self.batch_tokens, self.parallel.layout().dp
        if tokens % self.data.seq_len:
            raise ConfigError(
                f"train.batch_tokens={tokens} must be whole sequences of "
                f"data.seq_len={self.data.seq_len}; the nearest are {self._nearest_batches()}"
            )
        share = dp * self.train.microbatch_size
        if self.batch_sequences % share:
            raise ConfigError(
                f"train.batch_tokens={tokens} gives {self.batch_sequences} "
                f"sequences a step, which {_ranks(dp)} cannot share in microbatches of "
                f"train.microbatch_size={self.train.microbatch_size}; make it a multiple of "
                f"{share * self.data.seq_len} tokens, or choose a smaller microbatch_size or dp"
            )
        parallel = self.parallel
        schedule(parallel.schedule, parallel.pp, 0, self.batch_sequences // share, parallel.chunks)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step over all ranks: as given, else the preset's."""
        if self.train.batch_tokens is not None:
            return self.train.batch_tokens
        if self.model.preset:
            return preset(self.model.preset).batch_tokens
        raise ConfigError(
            "train.batch_tokens is missing; give the tokens of one optimizer step, "
            f"for example train.batch_tokens={64 * self.data.seq_len}"
        )

    @property
    def batch_sequences(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self.batch_tokens // self.data.seq_len

    def check_model(self, spec: ModelSpec, tokenizer_vocab: int) -> None:
        """Raise ConfigError or LayoutError if the run cannot train this model."""
        layout = self.parallel.layout()
        layout.check_model(spec)
        if layout.sequence_parallel:
            layout.check_slices({"data.seq_len": self.data.seq_len})
        group = self.router.group_sequences
        if self.train.microbatch_size % self.train.copies or (
            spec.num_experts and self.train.microbatch_size // self.train.copies % group
        ):
            raise ConfigError(
                f"train.microbatch_size={self.train.microbatch_size} must be a multiple of "
                + (f"train.copies={self.train.copies} x " if self.train.copies > 1 else "")
                + f"router.group_sequences={group}, whose sequences share the experts' capacity"
            )
        if self.data.seq_len > spec.max_seq_len:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} is longer than the model's "
                f"max_seq_len={spec.max_seq_len}; shorten the one or raise the other"
            )
        if tokenizer_vocab > spec.vocab_size:
            raise ConfigError(
                f"model.vocab_size={spec.vocab_size} is smaller than the tokenizer's "
                f"{tokenizer_vocab} tokens; use model.vocab_size={tokenizer_vocab} or more"
            )

    def resolved(self, horizon_steps: int) -> "TrainConfig":
        """With what presets decide filled in; `horizon_steps` holds if the schedule names none."""
        recipe = preset(self.model.preset) if self.model.preset else None
        schedule = self.schedule.resolved(
            learning_rate=recipe.learning_rate if recipe else None,
            min_learning_rate=recipe.min_learning_rate if recipe else None,
            batch_tokens=self.batch_tokens,
            horizon_steps=horizon_steps,
        )
        train = dataclasses.replace(self.train, batch_tokens=self.batch_tokens)
        parallel = dataclasses.replace(self.parallel, dp=self.parallel.layout().dp)
        return dataclasses.replace(self, schedule=schedule, parallel=parallel, train=train)

    def _nearest_batches(self) -> str:
        below = self.batch_sequences * self.data.seq_len
        choices = [number for number in (below, below + self.data.seq_len) if number]
        return " and ".join(map(str, choices))


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
