"""What a model is: plain numbers, no torch. Checkpoints store them, presets name known ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from gptmoe.errors import ConfigError

RouterKind = Literal["switch", "top2", "s_base", "expert_choice", "loss_free"]
KINDS: tuple[str, ...] = get_args(RouterKind)
ROUTER_CODES: Mapping[int, str] = MappingProxyType({0: "switch", 1: "s_base", 2: "expert_choice"})
"""The router types of the described systems' command lines, as other names of ours. Their code 0 is
top-1 with a balance loss; the order of the other two is that in which they are described."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How tokens choose experts, or experts tokens. Each router reads the fields that name it."""

    kind: RouterKind = field(default="switch", metadata={"aliases": ROUTER_CODES})
    """switch: top-1 with capacity (arXiv 2101.03961). top2: two experts a token (2006.16668).
    s_base: balanced by Sinkhorn in training (2202.01169). expert_choice: experts choose tokens
    (2202.09368), causal by thresholds. loss_free: top-1 balanced by a bias (2408.15664)."""
    capacity_factor: float = 1.25
    """Training only: an expert takes at most ceil(rows / experts * factor) of the rows of a group,
    where a token makes one row, or two with top2. expert_choice: each takes tokens / experts *
    factor, no more and no less. inf = all that come."""
    min_capacity: int = 4
    """Training only: lower bound of that capacity (not for expert_choice)."""
    aux_loss_coef: float = 0.01
    """switch, top2: weight of the load-balancing loss E * sum_e f_e P_e (2101.03961, eq. 4)."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss (arXiv 2202.08906, eq. 5); 0 = off."""
    group_sequences: int = 8
    """Consecutive sequences of the global batch (not of a rank) that share capacity and loss."""
    jitter: float = 0.0
    """Training only: what the router sees is multiplied by noise, uniform between
    1 - jitter and 1 + jitter (2101.03961, appendix C)."""
    sinkhorn_iterations: int = 8
    """s_base: at most so many, each over tokens and over experts."""
    sinkhorn_tolerance: float = 0.0
    """s_base: a group is done when the mass of no expert is further from its share than this part
    of it; 0 = never before the last iteration."""
    bias_rate: float = 1e-3
    """loss_free: what a step adds to the bias of a starved expert and takes from a busy one's."""
    threshold_decay: float = 0.99
    """expert_choice: of the running mean of the lowest score that an expert still took."""
    threshold_warmup: int = 1000
    """expert_choice: optimizer steps after which training, too, routes by the thresholds."""
    residual_depth: int = 1
    """expert_choice: layers of the Expert Residual behind the experts; 0 = none."""
    margin: int = 2
    """expert_choice: of the L-Softmax loss (arXiv 1612.02295), 1 to 4; 1 = a plain softmax."""
    margin_coef: float = 0.01
    """expert_choice: weight of that loss; 0 = off."""
    margin_anneal_start: float = 100.0
    """expert_choice: how much the plain logit outweighs the one with the margin at first,"""
    margin_anneal_decay: float = 0.99
    """times this with each optimizer step,"""
    margin_anneal_floor: float = 5.0
    """down to this."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"router.kind={self.kind!r} is not known; use one of {', '.join(KINDS)}"
            )
        _at_least("router.capacity_factor", self.capacity_factor, 0.01)
        for name in ("group_sequences", "sinkhorn_iterations"):
            _at_least(f"router.{name}", getattr(self, name), 1)
        for name in _FROM_ZERO:
            _at_least(f"router.{name}", getattr(self, name), 0)
        for name in ("jitter", "threshold_decay", "margin_anneal_decay"):
            _below_one(f"router.{name}", getattr(self, name))
        if self.margin not in (1, 2, 3, 4):
            raise ConfigError(f"router.margin={self.margin} must be 1, 2, 3 or 4")

    @property
    def loss_coefficients(self) -> Mapping[str, float]:
        """The weight of each loss that a routing may hold (Routing.losses)."""
        return {
            "aux_loss": self.aux_loss_coef,
            "z_loss": self.z_loss_coef,
            "margin_loss": self.margin_coef,
        }

    @property
    def choices(self) -> int:
        """Experts that each token chooses: 2 with top2."""
        return 2 if self.kind == "top2" else 1

    @property
    def rows_per_token(self) -> float:
        """Experts that work on a token, in the mean over many; what is dropped counts as done."""
        return self.capacity_factor if self.kind == "expert_choice" else self.choices

    @property
    def residual_layers(self) -> int:
        """Layers of the Expert Residual behind the experts of a layer."""
        return self.residual_depth if self.kind == "expert_choice" else 0


_FROM_ZERO = (
    "min_capacity", "aux_loss_coef", "z_loss_coef", "sinkhorn_tolerance", "bias_rate",
    "threshold_warmup", "residual_depth", "margin_coef", "margin_anneal_start",
    "margin_anneal_floor",
)  # fmt: skip


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
    residual_moe: bool = False
    """Beside its experts an MoE layer has a dense feed-forward layer, and a softmax over both mixes
    them for each token (PR-MoE: Rajbhandari et al. 2022, arXiv 2201.05596, section 4.1). Its
    pyramid is a list of `num_experts`."""
    router: RouterSpec = field(default_factory=RouterSpec)
    dropout: float = 0.0
    init_std: float = 0.006

    def __post_init__(self) -> None:
        for name in ("num_layers", "d_model", "num_heads", "d_ff", "vocab_size", "max_seq_len"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        _at_least("model.expert_interval", self.expert_interval, 1)
        _at_least("model.init_std", self.init_std, 0)
        _below_one("model.dropout", self.dropout)
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
        if self.router.choices > min(self.num_experts, default=2):
            raise ConfigError(
                f"router.kind={self.router.kind} sends a token to {self.router.choices} experts, "
                f"but a layer has model.num_experts={min(self.num_experts)}; give more, or use "
                "router.kind=switch"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based indices of the layers that hold experts."""
        if not self.num_experts:
            return ()
        return tuple(range(self.expert_interval - 1, self.num_layers, self.expert_interval))

    @property
    def shared_layers(self) -> int:
        """Feed-forward layers beside and behind the experts of each MoE layer."""
        return self.router.residual_layers + self.residual_moe

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


def _below_one(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{key}={value} must be at least 0 and below 1")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
