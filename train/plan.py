"""From a config to all that a run needs before a cluster starts: checked, prepared, resolved."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gptmoe import config as configs
from gptmoe import data
from gptmoe.checkpoint import Checkpoint, newest_valid, open_checkpoint
from gptmoe.errors import ConfigError
from gptmoe.loaded import spec_of
from gptmoe.model.spec import ModelSpec
from gptmoe.text import Tokenizer, load_tokenizer

from .config import TrainConfig

log = logging.getLogger(__name__)

Kind = Literal["pretrain", "finetune"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What the workers are told. Paths are absolute: every node must see them."""

    kind: Kind
    config: TrainConfig
    spec: ModelSpec
    run_dir: Path
    data_folder: Path
    tokenizer_path: Path
    max_steps: int
    resume_from: Path | None
    """The checkpoint to go on from."""
    weights_from: Path | None
    """Where a fresh run takes its weights; None = drawn from the seed."""

    def stored_config(self) -> dict[str, Any]:
        """What a checkpoint's config.json holds."""
        plain = configs.to_dict(self.config)
        return {
            "kind": self.kind,
            "model": configs.to_dict(self.spec),
            "train": plain,
            "digest": configs.digest(plain),
        }


def make_plan(
    kind: Kind, config: TrainConfig, progress: Callable[[data.Progress], None] | None = None
) -> RunPlan:
    """Check everything that can be checked without a cluster, and prepare the data."""
    source = open_checkpoint(config.model.checkpoint) if config.model.checkpoint else None
    tokenizer_path = _tokenizer_path(config, source)
    tokenizer = load_tokenizer(tokenizer_path)
    spec = _spec(config, source, tokenizer)
    config.check_model(spec, tokenizer.vocab_size)
    run_dir = config.run.dir.absolute()
    resume_from = newest_valid(run_dir / "checkpoints")
    folder = _data_folder(kind, config, run_dir, tokenizer, progress)
    samples = data.open_samples(
        folder, "train", config.data.seq_len, config.run.seed, expect_tokenizer=tokenizer.digest
    )
    max_steps = steps_of(config, samples.num_samples)
    if resume_from is not None:
        config = _keep_horizon(config, resume_from)
    config = config.resolved(max_steps)
    if resume_from is not None:
        _check_same(resume_from, spec, config, tokenizer)
    return RunPlan(
        kind=kind,
        config=config,
        spec=spec,
        run_dir=run_dir,
        data_folder=folder.absolute(),
        tokenizer_path=tokenizer_path.absolute(),
        max_steps=max_steps,
        resume_from=resume_from.path if resume_from else None,
        weights_from=source.path.absolute() if source else None,
    )


def steps_of(config: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of the run: max_steps or enough for the epochs, whichever is less."""
    bounds = [config.train.max_steps] if config.train.max_steps is not None else []
    if config.train.epochs is not None:
        bounds.append(math.ceil(config.train.epochs * num_samples / config.batch_sequences))
    return min(bounds)


def _tokenizer_path(config: TrainConfig, source: Checkpoint | None) -> Path:
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    if source is None:
        raise ConfigError(
            "data.tokenizer is missing; name a tokenizer.json, for example one made by "
            "gptmoe tokenizer train --input FILE --vocab-size 8000 --output DIR"
        )
    return source.path


def _spec(config: TrainConfig, source: Checkpoint | None, tokenizer: Tokenizer) -> ModelSpec:
    if source is None:
        return config.model.spec(config.router, tokenizer.vocab_size, config.data.seq_len)
    stored = load_tokenizer(source.path)
    if stored.digest != tokenizer.digest:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} (digest {tokenizer.digest}) is not the "
            f"tokenizer of model.checkpoint={source.path} (digest {stored.digest}); "
            "leave data.tokenizer out"
        )
    return config.model.refine(spec_of(source), config.router)


def _data_folder(
    kind: Kind,
    config: TrainConfig,
    run_dir: Path,
    tokenizer: Tokenizer,
    progress: Callable[[data.Progress], None] | None,
) -> Path:
    """The prepared folder: data.path itself, or run.dir/data made from raw files."""
    path = config.data.path
    if data.is_prepared(path):
        found = data.Manifest.load(path).recipe.kind
        if found != kind:
            raise ConfigError(
                f"data.path={path} was prepared for {found}, this run wants {kind}; "
                "prepare it again"
            )
        return path
    folder = run_dir / "data"
    data.prepare(
        [path],
        tokenizer,
        folder,
        kind=kind,
        columns=config.data.columns,
        validation_fraction=config.data.validation_fraction,
        validation=[config.data.validation_path] if config.data.validation_path else (),
        sep_text=config.data.sep_text,
        workers=config.data.workers,
        progress=progress,
    )
    return folder


def _keep_horizon(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """A run that goes on keeps the horizon it started with unless the config names one."""
    named = (config.schedule.horizon_steps, config.schedule.horizon_tokens) != (None, None)
    stored = checkpoint.config["train"]["schedule"]["horizon_steps"]
    schedule = config.schedule if named else replace(config.schedule, horizon_steps=stored)
    return replace(config, schedule=schedule)


def _check_same(
    checkpoint: Checkpoint, spec: ModelSpec, config: TrainConfig, tokenizer: Tokenizer
) -> None:
    """Refuse to go on with another model, tokenizer or order of samples than the run began with."""
    stored = checkpoint.config
    now = configs.to_dict(config)
    pairs = {
        "model": (stored["model"], configs.to_dict(spec)),
        "tokenizer": (load_tokenizer(checkpoint.path).digest, tokenizer.digest),
        "run.seed": (stored["train"]["run"]["seed"], now["run"]["seed"]),
        "data.seq_len": (stored["train"]["data"]["seq_len"], now["data"]["seq_len"]),
        "train.batch_tokens": (
            stored["train"]["train"]["batch_tokens"],
            now["train"]["batch_tokens"],
        ),
    }
    for name, (before, after) in pairs.items():
        if before != after:
            raise ConfigError(
                f"the run in {config.run.dir} cannot go on with another {name}: it began with "
                f"{_short(before, after)}, now it is {_short(after, before)}; "
                "restore it, or choose another run.dir"
            )


def _short(value: Any, other: Any) -> Any:
    """Of two differing tables only the differing keys."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {key: item for key, item in value.items() if other.get(key) != item}
    return value
