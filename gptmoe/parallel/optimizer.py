"""The optimizer's settings: plain data, no torch."""

from dataclasses import dataclass
from typing import Literal

from gptmoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """How gradients become updates. Norms and biases are not decayed."""

    kind: Literal["adamw", "sgd"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm over the whole model; 0 = no clipping."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1"
                )
        for name in ("eps", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be at least 0")
