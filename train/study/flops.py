"""Active FLOPs of a token, and the d_ff at which two models cost the same. Arithmetic, no torch.

Counted is the forward pass, a multiplication and an addition as two; training costs three times as
much. What a token uses is counted whatever the capacity: a token that a full expert turns away, or
that no expert takes, costs less than counted here. Norms, activations and biases are left out.
"""

import dataclasses
import math
from dataclasses import dataclass

from gptmoe.errors import ConfigError
from gptmoe.model.spec import ModelSpec

TOLERANCE = 0.02
"""Arms count as equal if their blocks' FLOPs differ by at most this share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of one token in a forward pass."""

    attention: float
    """Projections, and scores and sums over the mean number of earlier tokens."""
    ffn: float
    """Dense layers, and of MoE layers the experts that a token uses, residual and shared layers."""
    router: float
    head: float
    """The output head: the same for all arms, and therefore no part of what is compared."""

    @property
    def blocks(self) -> float:
        """What is compared: all but the output head."""
        return self.attention + self.ffn + self.router

    @property
    def total(self) -> float:
        return self.blocks + self.head


def flops(spec: ModelSpec, seq_len: int) -> Flops:
    """The active FLOPs of a token of `spec` in a sequence of `seq_len` tokens."""
    width = spec.d_model
    attention = 2 * 4 * width**2 + 4 * width * (seq_len + 1) / 2
    one = 2 * 2 * width * spec.d_ff
    ffn = router = 0.0
    for layer in range(spec.num_layers):
        experts = spec.experts_in_layer(layer)
        ffn += one * ffns_used(spec, experts)
        router += 2 * width * experts
        if experts and spec.residual_moe:
            router += 2 * width * 2
    return Flops(
        attention=spec.num_layers * attention,
        ffn=ffn,
        router=router,
        head=2 * width * spec.vocab_size,
    )


def ffns_used(spec: ModelSpec, experts: int) -> float:
    """Feed-forward networks of width d_ff that a token goes through in a layer, in the mean."""
    if not experts:
        return 1.0
    router = spec.router
    return min(router.rows_per_token, experts) + router.residual_layers + spec.residual_moe


def fit_d_ff(spec: ModelSpec, seq_len: int, target: float, multiple: int, name: str) -> ModelSpec:
    """`spec` with the d_ff, a multiple of `multiple`, whose blocks come nearest to `target` FLOPs.

    Raises ConfigError if the nearest is not within TOLERANCE.
    """
    at_one = flops(dataclasses.replace(spec, d_ff=1), seq_len).blocks
    slope = flops(dataclasses.replace(spec, d_ff=2), seq_len).blocks - at_one
    exact = (target - at_one + slope) / slope
    d_ff = max(multiple, round(exact / multiple) * multiple)
    fitted = dataclasses.replace(spec, d_ff=d_ff)
    check_equal(fitted, seq_len, target, name)
    return fitted


def check_equal(spec: ModelSpec, seq_len: int, target: float, name: str) -> None:
    """Raise ConfigError unless the blocks of `spec` cost `target` FLOPs a token within 2 %."""
    off = flops(spec, seq_len).blocks / target - 1
    if not math.fabs(off) <= TOLERANCE:
        raise ConfigError(
            f"arm {name} with d_ff={spec.d_ff} costs {off:+.1%} active FLOPs a token against its "
            f"reference, more than the {TOLERANCE:.0%} that count as equal; leave model.d_ff of "
            "the arm out, or choose a larger model.d_ff, a smaller study.d_ff_multiple, or less "
            "beside its experts (router.residual_depth, router.capacity_factor)"
        )
