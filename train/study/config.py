"""What a study of routers is: the tables of a file in configs/study/, checked.

The tables `model`, `router`, `train`, `optimizer`, `schedule` and `checkpoint` are those of a
training run and hold for every arm. What an arm does differently is in arms.py and `overrides`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from gptmoe.config import INPUT_PATH
from gptmoe.errors import ConfigError
from gptmoe.model.spec import RouterSpec
from gptmoe.parallel.optimizer import OptimizerSpec
from train.config import CheckpointConfig, LoopConfig
from train.model_config import ModelConfig
from train.schedule import ScheduleSpec

from .arms import check_names


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTable:
    """What is compared, how often, and where."""

    dir: Path
    """The study's folder: runs/, speed/, data/, tokenizer/, page.md, curves.png, results.json."""
    arms: tuple[str, ...]
    """Names from train/study/arms.py; `dense` is the size that the others are fitted to."""
    experts: tuple[int, ...] = (8,)
    """Each arm with experts runs once for each of these numbers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws weights and order of samples anew; arms of one seed see the same samples."""
    parallel: int = 1
    """Runs at a time."""
    threads: int = 1
    """Threads of each run."""
    d_ff_multiple: int = 8
    """d_ff of a fitted arm is a multiple of this."""
    smooth: int = 3
    """Validations in the moving mean of which the step to a loss is read; odd."""
    final_samples: int = 0
    """Validation samples of the last evaluation, causal and acausal; 0 = all."""
    speed_steps: int = 12
    """Steps by which each router's tokens/s are measured, one at a time; 0 = not measured."""
    speed_rounds: int = 2
    """So often, in turns; the page shows the median."""

    def __post_init__(self) -> None:
        check_names(self.arms)
        for name, least in (
            ("parallel", 1),
            ("threads", 1),
            ("d_ff_multiple", 1),
            ("smooth", 1),
            ("final_samples", 0),
            ("speed_steps", 0),
            ("speed_rounds", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"study.{name}={getattr(self, name)} must be at least {least}")
        if self.smooth % 2 == 0:
            raise ConfigError(f"study.smooth={self.smooth} must be odd: as many before as after")
        for name in ("experts", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"study.{name}={list(values)} must name each number once")
        if min(self.experts) < 2:
            raise ConfigError(f"study.experts={list(self.experts)} must be numbers of at least 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """What all arms learn from, prepared once."""

    inputs: tuple[Path, ...] = field(metadata=INPUT_PATH)
    """Files, folders or globs, as `gptmoe data prepare` takes them."""
    validation: tuple[Path, ...] = field(default=(), metadata=INPUT_PATH)
    """Default: validation_fraction of the documents."""
    validation_fraction: float = 0.05
    tokenizer: Path | None = field(default=None, metadata=INPUT_PATH)
    """Default: one of vocab_size tokens, learned from the inputs."""
    vocab_size: int = 5000
    tokenizer_characters: int = 4_000_000
    """The tokenizer is learned from so many characters, taken evenly from the inputs."""
    seq_len: int = 128
    workers: int = 2
    """Processes that tokenize."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("data.inputs is empty; name at least one file, folder or glob")
        if self.tokenizer_characters < 1:
            raise ConfigError(
                f"data.tokenizer_characters={self.tokenizer_characters} must be at least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """A whole study."""

    study: StudyTable
    data: CorpusConfig
    model: ModelConfig
    train: LoopConfig
    router: RouterSpec = field(default_factory=RouterSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By arm, lines as "router.margin=3" that hold for it alone; the page shows them."""

    def __post_init__(self) -> None:
        check_names(tuple(self.overrides), "overrides")
        if self.model.preset or self.model.checkpoint or self.model.num_experts is not None:
            raise ConfigError(
                "a study takes its model by parts (model.num_layers, d_model, num_heads, d_ff); "
                "leave out model.preset, model.checkpoint and model.num_experts: "
                "study.experts says how many experts"
            )
        if self.train.max_steps is None:
            raise ConfigError("a study needs train.max_steps: its arms take equally many steps")
