"""From a study's config to its runs: who trains what, with which d_ff, where. Pure; no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptmoe import config as configs
from gptmoe.errors import ConfigError
from gptmoe.model.counts import parameters
from gptmoe.model.spec import ModelSpec
from train.config import DataConfig, RunConfig, TrainConfig

from .arms import ARMS, Variant, variants
from .config import StudyConfig
from .flops import Flops, check_equal, fit_d_ff, flops

PREPARED, TOKENIZER = "data", "tokenizer"
"""Folders of a study's folder that hold its corpus as tokens, and the tokenizer."""
SINKHORN = (8, 50)
"""Iterations of s_base whose throughput is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A variant with its model."""

    variant: Variant
    spec: ModelSpec
    flops: Flops
    against_reference: float
    """FLOPs of its blocks over those that it is fitted to: between 0.98 and 1.02."""
    overrides: tuple[str, ...]
    """Of the config, for this arm alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """One run of a study: an arm with a seed."""

    variant: Variant
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Where it trains; see results.py for what is in it."""
        return self.config.run.dir

    @property
    def name(self) -> str:
        """As `switch-8, seed 1`."""
        return f"{self.variant.name}, seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRun:
    """One measurement of tokens/s, with the machine for itself."""

    name: str
    """The variant's; `s_base-8, 50 iterations`."""
    round: int
    folder: Path
    config: TrainConfig


def sized(config: StudyConfig, vocab_size: int) -> tuple[Sized, ...]:
    """Every variant with the d_ff at which a token costs as much as in the dense arm.

    Raises ConfigError where that cannot be had within 2 %.
    """
    return tuple(
        _size(config, variant, vocab_size)
        for variant in variants(config.study.arms, config.study.experts)
    )


def arm_runs(config: StudyConfig, models: tuple[Sized, ...]) -> tuple[ArmRun, ...]:
    """All runs, seed by seed: after each seed there is a whole set of pairs to compare."""
    folder = config.study.dir.absolute()
    return tuple(
        ArmRun(
            variant=it.variant,
            seed=seed,
            config=_train_config(
                config, it, seed, folder / "runs" / f"{it.variant.name}-seed-{seed}"
            ),
        )
        for seed in config.study.seeds
        for it in models
    )


def speed_runs(config: StudyConfig, models: tuple[Sized, ...]) -> tuple[SpeedRun, ...]:
    """Measurements of tokens/s in turns: each round has every variant, s_base twice."""
    if not config.study.speed_steps:
        return ()
    folder = config.study.dir.absolute() / "speed"
    found = []
    for number in range(1, config.study.speed_rounds + 1):
        for it in models:
            for name, iterations in _timed(it):
                place = folder / f"{name.replace(', ', '-').replace(' ', '-')}-round-{number}"
                run = _train_config(config, it, config.study.seeds[0], place)
                run = dataclasses.replace(
                    run,
                    router=dataclasses.replace(run.router, sinkhorn_iterations=iterations),
                    train=dataclasses.replace(run.train, max_steps=config.study.speed_steps),
                )
                found.append(SpeedRun(name=name, round=number, folder=place, config=run))
    return tuple(found)


def _timed(it: Sized) -> list[tuple[str, int]]:
    """What is measured of a variant: a name, and iterations of Sinkhorn."""
    if it.spec.num_experts and it.spec.router.kind == "s_base":
        return [(f"{it.variant.name}, {count} iterations", count) for count in SINKHORN]
    return [(it.variant.name, it.spec.router.sinkhorn_iterations)]


def _size(config: StudyConfig, variant: Variant, vocab_size: int) -> Sized:
    seq_len, multiple = config.data.seq_len, config.study.d_ff_multiple
    arm = ARMS[variant.arm]
    base = config.model.spec(config.router, vocab_size, seq_len)
    dense = dataclasses.replace(
        base, num_experts=(), num_layers=base.num_layers * arm.layers, residual_moe=False
    )
    target = flops(dense, seq_len).blocks
    overrides = config.overrides.get(variant.arm, ())
    run = _overridden(config, variant, ())
    spec = run.model.spec(run.router, vocab_size, seq_len)
    own_width = any(line.replace(" ", "").startswith("model.d_ff=") for line in overrides)
    if own_width or not arm.experts:
        check_equal(spec, seq_len, target, variant.name)
    else:
        spec = fit_d_ff(spec, seq_len, target, multiple, variant.name)
    cost = flops(spec, seq_len)
    return Sized(
        variant=variant,
        spec=spec,
        flops=cost,
        against_reference=cost.blocks / target,
        overrides=overrides,
    )


def _train_config(config: StudyConfig, it: Sized, seed: int, folder: Path) -> TrainConfig:
    run = _overridden(config, it.variant, (f"model.d_ff={it.spec.d_ff}", f"run.seed={seed}"))
    return dataclasses.replace(run, run=dataclasses.replace(run.run, dir=folder))


def _overridden(config: StudyConfig, variant: Variant, more: tuple[str, ...]) -> TrainConfig:
    """The arm's training config: the study's tables, the arm's overrides, then the config's."""
    arm, folder = ARMS[variant.arm], config.study.dir.absolute()
    shared = TrainConfig(
        run=RunConfig(dir=folder),
        model=config.model,
        data=DataConfig(
            path=folder / PREPARED, tokenizer=folder / TOKENIZER, seq_len=config.data.seq_len
        ),
        train=config.train,
        router=config.router,
        optimizer=config.optimizer,
        schedule=config.schedule,
        checkpoint=config.checkpoint,
    )
    own = config.overrides.get(variant.arm, ())
    for line in own:
        _check_override(variant.arm, line)
    lines = [f"model.num_experts={variant.experts}", *arm.overrides, *own, *more]
    if arm.layers > 1 and config.model.num_layers is not None:
        lines.insert(0, f"model.num_layers={config.model.num_layers * arm.layers}")
    if not arm.experts:
        lines.insert(0, "model.residual_moe=false")
    return configs.override(shared, lines)


_TUNABLE = ("router.", "schedule.", "optimizer.", "model.d_ff", "model.init_std", "model.dropout")


def _check_override(arm: str, line: str) -> None:
    """What makes arms incomparable may not differ between them."""
    if not line.strip().startswith(_TUNABLE) or line.replace(" ", "").startswith("router.kind"):
        raise ConfigError(
            f"overrides.{arm} holds {line!r}, but arms share everything else; what may differ: "
            "router.* (not router.kind), schedule.*, optimizer.*, model.d_ff, model.init_std, "
            "model.dropout"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table of sizes."""

    name: str
    parameters: int
    active: int
    d_ff: int
    blocks_flops: float
    total_flops: float
    against_reference: float
    tokens: int
    """Of one run."""
    estimated_s: float
    """Of one run; 0 = not estimated."""


def table(
    config: StudyConfig, models: tuple[Sized, ...], seconds: Mapping[str, float]
) -> tuple[Row, ...]:
    """The sizes of all variants; `seconds` is the estimated time of a run by variant."""
    assert config.train.max_steps is not None
    tokens = config.train.max_steps * arm_runs(config, models)[0].config.batch_tokens
    return tuple(
        Row(
            name=it.variant.name,
            parameters=parameters(it.spec).total,
            active=parameters(it.spec).active,
            d_ff=it.spec.d_ff,
            blocks_flops=it.flops.blocks,
            total_flops=it.flops.total,
            against_reference=it.against_reference,
            tokens=tokens,
            estimated_s=seconds.get(it.variant.name, 0.0),
        )
        for it in models
    )
