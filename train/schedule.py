"""Learning-rate schedules as pure functions of the step.

The horizon is a key of its own, so a run may be extended without changing the steps already taken.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from gptmoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """Warm-up, then decay until the horizon, then the minimum."""

    kind: Literal["linear", "cosine", "noam", "constant"] = "linear"
    """noam: rate * min(s^-0.5, s * warmup^-1.5) (Vaswani et al., arXiv 1706.03762, section 5.3)."""
    learning_rate: float | None = None
    """Default: the preset's, else 1e-3."""
    min_learning_rate: float | None = None
    """Default: the preset's, else a tenth of learning_rate."""
    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    horizon_steps: int | None = None
    """Where the decay ends; default: train.max_steps as it was when the run began."""
    horizon_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "horizon"):
            if (
                getattr(self, f"{name}_steps") is not None
                and getattr(self, f"{name}_tokens") is not None
            ):
                raise ConfigError(
                    f"give only one of schedule.{name}_steps and schedule.{name}_tokens"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "kind" and value is not None and not value >= 0:
                raise ConfigError(f"schedule.{field.name}={value} must be at least 0")

    def resolved(
        self,
        *,
        learning_rate: float | None,
        min_learning_rate: float | None,
        batch_tokens: int,
        horizon_steps: int,
    ) -> "ScheduleSpec":
        """With rates, and with warm-up and horizon in steps.

        The arguments are the preset's rates, the batch, and the horizon where none is named.
        """
        rate = _first(self.learning_rate, learning_rate, 1e-3)
        inherited = min_learning_rate if self.learning_rate is None else None
        return ScheduleSpec(
            kind=self.kind,
            learning_rate=rate,
            min_learning_rate=_first(self.min_learning_rate, inherited, rate / 10),
            warmup_steps=int(
                _first(self.warmup_steps, _steps(self.warmup_tokens, batch_tokens), 0)
            ),
            horizon_steps=int(
                _first(self.horizon_steps, _steps(self.horizon_tokens, batch_tokens), horizon_steps)
            ),
        )


def learning_rate(spec: ScheduleSpec, step: int) -> float:
    """The rate of optimizer step `step`, counted from 1; `spec` is resolved."""
    rate, floor = spec.learning_rate, spec.min_learning_rate
    warmup, horizon = spec.warmup_steps, spec.horizon_steps
    assert rate is not None
    assert floor is not None
    assert warmup is not None
    assert horizon is not None
    if spec.kind == "noam":
        return rate * min(step**-0.5, step * max(1, warmup) ** -1.5)
    if step <= warmup:
        return rate * step / warmup
    if spec.kind == "constant":
        return rate
    done = min(1.0, (step - warmup) / max(1, horizon - warmup))
    left = 1 - done if spec.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (rate - floor) * left


def _steps(tokens: int | None, batch_tokens: int) -> int | None:
    return None if tokens is None else math.ceil(tokens / batch_tokens)


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
