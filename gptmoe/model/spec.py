"""What a model is: plain numbers, no torch. Checkpoints store them, presets name known ones."""

from dataclasses import dataclass, field
from typing import Literal

from gptmoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How tokens choose experts."""

    kind: Literal["switch"] = "switch"
    """switch: top-1 with capacity (Fedus et al. 2021, arXiv 2101.03961)."""
    capacity_factor: float = 1.25
    """Training only: an expert takes at most ceil(tokens / experts * factor) tokens of a group."""
    min_capacity: int = 4
    """Training only: lower bound of that capacity."""
    aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss E * sum_e f_e P_e (arXiv 2101.03961, eq. 4)."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss (arXiv 2202.08906, eq. 5); 0 = off."""
    group_sequences: int = 8
    """Consecutive sequences of the global batch (not of a rank) that share capacity and loss."""

    def __post_init__(self) -> None:
        _at_least("router.capacity_factor", self.capacity_factor, 0.01)
        _at_least("router.min_capacity", self.min_capacity, 0)
        _at_least("router.aux_loss_coef", self.aux_loss_coef, 0)
        _at_least("router.z_loss_coef", self.z_loss_coef, 0)
        _at_least("router.group_sequences", self.group_sequences, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A GPT decoder, dense or with experts in place of some feed-forward layers."""

    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    vocab_size: int = 51_200
    max_seq_len: int = 2048
    num_experts: tuple[int, ...] = ()
    """One number per MoE layer; () means dense."""
    expert_interval: int = 2
    """MoE on 0-based layers interval-1, 2*interval-1, ...: 2 gives 1, 3, 5, ...; 1 gives all."""
    router: RouterSpec = field(default_factory=RouterSpec)
    dropout: float = 0.0
    init_std: float = 0.006

    def __post_init__(self) -> None:
        for name in ("num_layers", "d_model", "num_heads", "d_ff", "vocab_size", "max_seq_len"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        _at_least("model.expert_interval", self.expert_interval, 1)
        _at_least("model.init_std", self.init_std, 0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        if self.d_model % self.num_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} must divide model.d_model={self.d_model}; "
                f"use one of {', '.join(map(str, _divisors(self.d_model)))}"
            )
        slots = self.num_layers // self.expert_interval
        if self.num_experts and len(self.num_experts) != slots:
            raise ConfigError(
                f"model.num_experts has {len(self.num_experts)} numbers, but {self.num_layers} "
                f"layers with model.expert_interval={self.expert_interval} have {slots} MoE "
                f"layers; give one number for all or {slots}"
            )
        for count in self.num_experts:
            _at_least("model.num_experts", count, 1)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based indices of the layers that hold experts."""
        if not self.num_experts:
            return ()
        return tuple(range(self.expert_interval - 1, self.num_layers, self.expert_interval))

    def experts_in_layer(self, layer: int) -> int:
        """How many experts layer `layer` holds; 0 for a dense one."""
        layers = self.moe_layers
        return self.num_experts[layers.index(layer)] if layer in layers else 0


def expand_experts(
    num_experts: int | tuple[int, ...], num_layers: int, interval: int
) -> tuple[int, ...]:
    """One number for all MoE layers, or one for each, to one for each; 0 means dense."""
    if isinstance(num_experts, int):
        return (num_experts,) * (num_layers // interval) if num_experts else ()
    return tuple(num_experts)


def _at_least(key: str, value: float, least: float) -> None:
    if not value >= least:  # written so that NaN fails
        raise ConfigError(f"{key}={value} must be at least {least:g}")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
