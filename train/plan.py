"""From a config to all that a run needs before a cluster starts: checked, prepared, resolved."""

import dataclasses
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptmoe import config as configs
from gptmoe import data
from gptmoe.checkpoint import Checkpoint, newest_valid, open_checkpoint
from gptmoe.errors import ConfigError
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.loss_scale import LossScale
from gptmoe.stored import spec_of
from gptmoe.text import Tokenizer, load_tokenizer

from .config import TrainConfig
from .inputs import Inputs, gather

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
    data_digest: str
    """Names the training samples, wherever they lie."""
    has_validation: bool
    tokenizer_path: Path
    max_steps: int
    resume_from: Path | None
    """The checkpoint to go on from."""
    done: int
    """Steps that it had taken."""
    weights_from: Path | None
    """Where a fresh run takes its weights; None = drawn from the seed."""

    @property
    def run_name(self) -> str:
        """The run's name on a cluster: its folder's name, and 6 digits that stand for its path.

        ASCII, since Ray's names must be.
        """
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.run_dir.name).strip("-") or "run"
        path = os.fsencode(os.path.realpath(self.run_dir))
        return f"{name}-{hashlib.sha256(path).hexdigest()[:6]}"

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale to begin with; None unless products are float16."""
        if self.config.train.dtype != "float16":
            return None
        if self.resume_from is None:
            return LossScale()
        stored = open_checkpoint(self.resume_from, verify=False).progress
        return LossScale(**stored.get("loss_scale", {}))

    def from_newest_checkpoint(self) -> "RunPlan":
        """The plan as it stands now: it goes on from the newest complete checkpoint.

        Tokenizer included: where the run took it from at its start may be gone.
        """
        newest = newest_valid(self.run_dir / "checkpoints")
        if newest is None:
            return self
        done = int(newest.progress["step"])
        return dataclasses.replace(
            self, resume_from=newest.path, done=done, tokenizer_path=newest.path
        )

    def in_words(self) -> str:
        """One line for a log."""
        if self.done >= self.max_steps:
            return (
                f"{self.run_dir} is complete: {self.done} of {self.max_steps} steps are done; "
                "raise train.max_steps or train.epochs to go on"
            )
        start = f"goes on after step {self.done}" if self.resume_from else "starts"
        return f"{self.run_dir} {start}, to step {self.max_steps}"

    def stored_config(self) -> dict[str, Any]:
        """What a checkpoint's config.json holds."""
        plain = configs.to_dict(self.config)
        return {
            "kind": self.kind,
            "model": configs.to_dict(self.spec),
            "train": plain,
            "data_digest": self.data_digest,
            "digest": configs.digest(plain),
        }


def make_plan(
    kind: Kind, config: TrainConfig, progress: Callable[[data.Progress], None] | None = None
) -> RunPlan:
    """Check everything that can be checked without a cluster, and prepare the data."""
    run_dir = config.run.dir.absolute()
    resume_from = newest_valid(run_dir / "checkpoints")
    inputs = gather(config, run_dir / "inputs", begins=resume_from is None)
    source = open_checkpoint(inputs.checkpoint) if inputs.checkpoint else None
    if config.model.checkpoint and resume_from:
        _say_if_another(resume_from, config)
        source = resume_from  # it holds all that the run has of the other, which may be gone
    tokenizer_path = _tokenizer_path(inputs, source)
    tokenizer = load_tokenizer(tokenizer_path)
    spec = _spec(config, source, tokenizer)
    config.check_model(spec, tokenizer.vocab_size)
    if resume_from:
        _check_same(resume_from, kind, spec, config, tokenizer)
    elif kind == "finetune" and not source:
        log.warning("finetuning starts from random weights: model.checkpoint is not given")
    folder = _data_folder(kind, config, inputs, run_dir, tokenizer, progress)
    num_samples, has_validation = _open_data(config, folder, tokenizer)
    data_digest = _data_digest(folder)
    if resume_from:
        _check("training data", resume_from.config.get("data_digest"), data_digest, config)
    max_steps = steps_of(config, num_samples)
    stored_schedule = _table(resume_from, "train").get("schedule", {})
    return RunPlan(
        kind=kind,
        config=config.resolved(stored_schedule.get("horizon_steps", max_steps)),
        spec=spec,
        run_dir=run_dir,
        data_folder=folder.absolute(),
        data_digest=data_digest,
        has_validation=has_validation,
        tokenizer_path=tokenizer_path.absolute(),
        max_steps=max_steps,
        resume_from=resume_from.path if resume_from else None,
        done=int(resume_from.progress["step"]) if resume_from else 0,
        weights_from=source.path.absolute() if source and not resume_from else None,
    )


def steps_of(config: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of the run: max_steps or enough for the epochs, whichever is less."""
    bounds = [config.train.max_steps] if config.train.max_steps is not None else []
    if config.train.epochs is not None:
        bounds.append(math.ceil(config.train.epochs * num_samples / config.batch_sequences))
    return min(bounds)


def _tokenizer_path(inputs: Inputs, source: Checkpoint | None) -> Path:
    if inputs.tokenizer is not None:
        return inputs.tokenizer
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
            f"tokenizer of {source.path}, from which this goes on (digest {stored.digest}); leave "
            "data.tokenizer out"
        )
    return config.model.refine(spec_of(source), config.router)


def _data_folder(
    kind: Kind,
    config: TrainConfig,
    inputs: Inputs,
    run_dir: Path,
    tokenizer: Tokenizer,
    progress: Callable[[data.Progress], None] | None,
) -> Path:
    """The prepared folder: data.path itself, or run.dir/data made from raw files."""
    path = inputs.data
    if data.is_prepared(path):
        found = data.Manifest.load(path).recipe.kind
        if found != kind:
            raise ConfigError(
                f"data.path={path} was prepared for {found}, this run wants {kind}; "
                "prepare it again"
            )
        for key in ("validation_path", "columns", "sep_text"):
            if getattr(config.data, key):
                raise ConfigError(
                    f"data.{key} means nothing to data.path={path}, which is prepared already; "
                    "give it to gptmoe data prepare, or name raw files as data.path"
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
        validation=[inputs.validation] if inputs.validation else (),
        sep_text=config.data.sep_text,
        workers=config.data.workers,
        progress=progress,
    )
    return folder


def _open_data(config: TrainConfig, folder: Path, tokenizer: Tokenizer) -> tuple[int, bool]:
    """The number of training samples, and whether there are any to validate by."""
    seq_len, seed = config.data.seq_len, config.run.seed
    train = data.open_samples(folder, "train", seq_len, seed, expect_tokenizer=tokenizer.digest)
    has_validation = train.manifest.splits["validation"].documents > 0
    if has_validation:
        data.open_samples(folder, "validation", seq_len, seed)
    else:
        log.warning("%s has no validation split: no validation loss will be recorded", folder)
    return train.num_samples, has_validation


def _data_digest(folder: Path) -> str:
    """12 hexadecimal digits that name the training split of a prepared folder by its content."""
    files = data.Manifest.load(folder).files
    return configs.digest({f.path: f.sha256 for f in files if f.path.startswith("train-")})


def _check_same(
    checkpoint: Checkpoint, kind: Kind, spec: ModelSpec, config: TrainConfig, tokenizer: Tokenizer
) -> None:
    """Refuse to go on with another model, tokenizer or order of samples than the run began with."""
    run, loop = _table(checkpoint, "train", "run"), _table(checkpoint, "train", "train")
    samples = _table(checkpoint, "train", "data")
    _check("command", checkpoint.config.get("kind"), kind, config)
    _check("model", configs.to_dict(spec_of(checkpoint)), configs.to_dict(spec), config)
    _check("tokenizer", load_tokenizer(checkpoint.path).digest, tokenizer.digest, config)
    _check("run.seed", run.get("seed"), config.run.seed, config)
    _check("data.seq_len", samples.get("seq_len"), config.data.seq_len, config)
    _check("train.batch_tokens", loop.get("batch_tokens"), config.batch_tokens, config)


def _say_if_another(resume_from: Checkpoint, config: TrainConfig) -> None:
    began = _table(resume_from, "train", "model").get("checkpoint")
    if began and str(began) != str(config.model.checkpoint):
        log.warning(
            "the run in %s goes on with its own weights; it began from %s, and "
            "model.checkpoint=%s is not read",
            config.run.dir,
            began,
            config.model.checkpoint,
        )


def _check(name: str, before: Any, now: Any, config: TrainConfig) -> None:
    if before != now:
        raise ConfigError(
            f"the run in {config.run.dir} cannot go on with another {name}: it began with "
            f"{_differing(before, now)}, now it is {_differing(now, before)}; "
            "restore it, or choose another run.dir"
        )


def _table(checkpoint: Checkpoint | None, *names: str) -> Mapping[str, Any]:
    """A table of the config that is stored in a checkpoint; empty where there is none."""
    table: Mapping[str, Any] = checkpoint.config if checkpoint else {}
    for name in names:
        table = table.get(name, {})
    return table


def _differing(value: Any, other: Any) -> Any:
    """Of two differing tables only the differing keys."""
    if isinstance(value, dict) and isinstance(other, dict):
        changed = [key for key, item in value.items() if other.get(key) != item]
        return {key: _differing(value[key], other.get(key)) for key in changed}
    return value
