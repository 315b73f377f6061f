"""What a study's folder says: the curves, verdicts and speeds of all runs that are finished."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptmoe import metrics

from .arms import Variant
from .config import StudyConfig
from .intervals import Interval, interval, ratio_interval, smoothed, step_to
from .order import read_done
from .plan import ArmRun, Sized, SpeedRun, arm_runs, sized, speed_runs

_LATE = 0.1
"""Training's load is that of the last tenth of the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One finished run."""

    validation: tuple[tuple[int, float], ...]
    """(step, loss), with causal routing."""
    training: tuple[tuple[int, float], ...]
    """(step, cross-entropy), routed as training routes."""
    busiest: tuple[tuple[int, float], ...]
    """(step, busiest expert over the mean) in training, worst layer; empty for a dense arm."""
    loss: float
    """Of the last weights on the last evaluation's samples, with causal routing."""
    acausal_loss: float | None
    """The same weights when experts see all tokens of a group; expert choice only."""
    load: Sequence[Mapping[str, float]]
    """At that evaluation, by MoE layer; see load.LayerLoad."""
    late: Mapping[str, float]
    """In training, means over the last steps: load_max_over_mean, dropped_ratio, ..."""
    seconds: float
    """Of all its steps."""


@dataclass(frozen=True, slots=True)
class Speedup:
    """Of the steps to a fixed loss. A run that never came down to it counts as if it had at its
    end: then `times` is more than the truth."""

    times: Interval
    reached: int
    seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A study, as far as it has come."""

    config: StudyConfig
    models: tuple[Sized, ...]
    runs: Mapping[tuple[Variant, int], RunResult]
    speeds: Mapping[str, tuple[float, ...]]
    """Tokens/s by variant, one value a round."""
    missing: tuple[str, ...]
    """Runs that are not finished."""
    passes: float
    """How often an arm sees each training sample."""

    def seeds_of(self, *variants: Variant) -> list[int]:
        """Seeds for which all of these are finished."""
        seeds = self.config.study.seeds
        return [seed for seed in seeds if all((it, seed) in self.runs for it in variants)]

    def losses(self, variant: Variant) -> list[float]:
        """Final losses by seed."""
        return [self.runs[variant, seed].loss for seed in self.seeds_of(variant)]

    def difference(self, one: Variant, other: Variant) -> Interval | None:
        """Final loss of `one` minus that of `other`, paired by seed; None without a pair."""
        seeds = self.seeds_of(one, other)
        pairs = [self.runs[one, seed].loss - self.runs[other, seed].loss for seed in seeds]
        return interval(pairs) if pairs else None

    def differences_by_step(self, one: Variant, other: Variant) -> list[tuple[int, Interval]]:
        """The same for the validations of the second half of training."""
        seeds = self.seeds_of(one, other)
        found: dict[int, list[float]] = {}
        for seed in seeds:
            mine, its = (dict(self.runs[it, seed].validation) for it in (one, other))
            for step in sorted(mine.keys() & its.keys()):
                found.setdefault(step, []).append(mine[step] - its[step])
        half = max(found, default=0) / 2
        return [(step, interval(values)) for step, values in found.items() if step >= half]

    def speedup(self, variant: Variant, reference: Variant) -> "Speedup | None":
        """How many times fewer steps `variant` takes to the reference's last validation loss."""
        seeds, ratios, reached = self.seeds_of(variant, reference), [], 0
        for seed in seeds:
            last_step, goal = self.runs[reference, seed].validation[-1]
            curve = smoothed(self.runs[variant, seed].validation, self.config.study.smooth)
            step = step_to(curve, goal)
            ratios.append(last_step / (step or curve[-1][0]))
            reached += step is not None
        return Speedup(ratio_interval(ratios), reached, len(seeds)) if seeds else None

    def acausal_cost(self, variant: Variant) -> Interval | None:
        """Causal minus acausal loss of the same weights, by seed."""
        runs = [self.runs[variant, seed] for seed in self.seeds_of(variant)]
        costs = [run.loss - run.acausal_loss for run in runs if run.acausal_loss is not None]
        return interval(costs) if costs else None


def collect(config: StudyConfig, vocab_size: int, passes: float) -> Results:
    """Read what there is. Raises DataError for a damaged file."""
    models = sized(config, vocab_size)
    runs, missing = {}, []
    for run in arm_runs(config, models):
        done = read_done(run.folder)
        if done is None:
            missing.append(run.name)
        else:
            runs[run.variant, run.seed] = _run(run, done)
    return Results(
        config=config,
        models=models,
        runs=runs,
        speeds=_speeds(speed_runs(config, models)),
        missing=tuple(missing),
        passes=passes,
    )


def _run(run: ArmRun, done: Mapping[str, Any]) -> RunResult:
    records = metrics.read(run.folder / "metrics.jsonl")
    steps = [record for record in records if "lm_loss" in record]
    late = steps[-max(1, round(len(steps) * _LATE)) :]
    names = ("load_max_over_mean", "dropped_ratio", "unrouted_ratio", "router_entropy")
    return RunResult(
        validation=tuple((r["step"], r["val_loss"]) for r in records if "val_loss" in r),
        training=tuple((record["step"], record["lm_loss"]) for record in steps),
        busiest=tuple(
            (record["step"], record["load_max_over_mean"])
            for record in steps
            if "load_max_over_mean" in record
        ),
        loss=done["loss"],
        acausal_loss=done.get("acausal_loss"),
        load=done.get("load", ()),
        late={
            name: statistics.fmean(record[name] for record in late)
            for name in names
            if name in late[-1]
        },
        seconds=sum(record["step_s"] for record in steps),
    )


def _speeds(measured: Sequence[SpeedRun]) -> dict[str, tuple[float, ...]]:
    found: dict[str, tuple[float, ...]] = {}
    for run in measured:
        done = read_done(run.folder)
        if done is not None:
            found[run.name] = (*found.get(run.name, ()), float(done["tokens_per_s"]))
    return found
