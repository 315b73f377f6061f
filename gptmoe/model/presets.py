"""Known model sizes by name, each with the recipe it is trained by. No torch.

preset("1.3B+MoE-64").spec         # 24 x 2048, 64 experts on every second layer
preset("0.35B+8").learning_rate    # any dense size takes any number of experts
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from gptmoe.errors import ConfigError

from .spec import ModelSpec, expand_experts

EXPERT_INTERVAL = 2
"""MoE presets hold experts on every second layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model and how it is pretrained. The fields with a default are the same for every size."""

    name: str
    """The canonical name, also when the preset was asked for by an alias."""
    spec: ModelSpec
    learning_rate: float
    min_learning_rate: float
    """Where the linear decay ends."""
    batch_tokens: int
    seq_len: int = 2048
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    validation_fraction: float = 0.02
    validate_every_steps: int = 100
    validation_batches: int = 10


ALIASES: Mapping[str, str] = MappingProxyType({"base": "0.125B", "large": "0.35B"})


def preset(name: str) -> Preset:
    """The preset called `name`: a listed name, an alias, or a dense size with `+MoE-N` or `+N`.

    A combination that is not listed takes the recipe of its dense size. Raises ConfigError for an
    unknown name, with the nearest ones.
    """
    if name in PRESETS:
        return PRESETS[name]
    combined = re.fullmatch(r"(.+)\+(?:MoE-?)?([0-9]+)", name, re.IGNORECASE)
    base = _DENSE.get(combined[1]) if combined else None
    if not combined or not base:
        raise ConfigError(_unknown(name))
    if not int(combined[2]):
        raise ConfigError(
            f"model.preset={name!r} asks for 0 experts; leave out the + part for {base.name}"
        )
    mixture = _with_experts(base, int(combined[2]))
    return PRESETS.get(mixture.name, mixture)


def _dense(
    name: str, num_layers: int, d_model: int, num_heads: int, learning_rate: float, batch: int
) -> Preset:
    """One row of the table; `batch` in units of 2**19 tokens, the rate decays to a tenth."""
    spec = ModelSpec(num_layers=num_layers, d_model=d_model, num_heads=num_heads, d_ff=4 * d_model)
    return Preset(
        name=name,
        spec=spec,
        learning_rate=learning_rate,
        min_learning_rate=_tenth(learning_rate),
        batch_tokens=batch * 2**19,
    )


def _with_experts(base: Preset, num_experts: int, learning_rate: float | None = None) -> Preset:
    layers = expand_experts(num_experts, base.spec.num_layers, EXPERT_INTERVAL)
    rate = learning_rate or base.learning_rate
    return dataclasses.replace(
        base,
        name=f"{base.name}+MoE-{num_experts}",
        spec=dataclasses.replace(base.spec, num_experts=layers, expert_interval=EXPERT_INTERVAL),
        learning_rate=rate,
        min_learning_rate=_tenth(rate),
    )


def _tenth(rate: float) -> float:
    return float(f"{rate / 10:.6g}")  # 6e-05, not 5.9999999999999995e-05


def _unknown(name: str) -> str:
    near = get_close_matches(name, PRESETS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"sizes: {', '.join(_DENSE)};"
    return (
        f"model.preset={name!r} is not known; {hint} "
        "any dense size takes experts, for example 1.3B+MoE-64"
    )


# name, num_layers, d_model, num_heads, learning rate, batch
_SIZES = (
    _dense("0.125B", 12, 768, 12, 6e-4, 1),
    _dense("0.35B", 24, 1024, 16, 3e-4, 1),
    _dense("0.76B", 24, 1536, 16, 2.5e-4, 1),
    _dense("1.3B", 24, 2048, 32, 2e-4, 2),
    _dense("2.7B", 32, 2560, 32, 1.6e-4, 2),
    _dense("3.6B", 30, 3072, 32, 1.6e-4, 2),
    _dense("6.7B", 32, 4096, 32, 1.2e-4, 4),
    _dense("13B", 40, 5120, 40, 1e-4, 12),
    _dense("30B", 48, 7168, 56, 1e-4, 12),
    _dense("175B", 96, 12288, 96, 1.2e-4, 12),
)
_BY_SIZE = {size.name: size for size in _SIZES}
_DENSE = _BY_SIZE | {alias: _BY_SIZE[size] for alias, size in ALIASES.items()}
_MIXTURES = (
    _with_experts(_BY_SIZE["0.35B"], 64),
    _with_experts(_BY_SIZE["1.3B"], 32),
    _with_experts(_BY_SIZE["1.3B"], 64, learning_rate=1.6e-4),
    _with_experts(_BY_SIZE["2.7B"], 64),
    _with_experts(_BY_SIZE["3.6B"], 64),
)

PRESETS: Mapping[str, Preset] = MappingProxyType(_DENSE | {moe.name: moe for moe in _MIXTURES})
"""Every listed name, aliases included, in order of size: dense first."""
