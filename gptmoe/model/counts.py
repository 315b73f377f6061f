"""How many parameters a model has, by arithmetic alone. No torch, nothing is allocated."""

from dataclasses import dataclass

from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Count:
    """Numbers of parameters."""

    total: int
    """All of them: what a checkpoint stores."""
    active: int
    """Those that one token uses: of each MoE layer the router, one expert (or as many as work on a
    token in the mean) and the layers that all tokens go through."""


def parameters(spec: ModelSpec) -> Count:
    """Count the parameters of `spec`; embeddings count once, since the output head is tied."""
    norm = 2 * spec.d_model
    embeddings = (spec.vocab_size + spec.max_seq_len) * spec.d_model
    attention = _linear(spec.d_model, 3 * spec.d_model) + _linear(spec.d_model, spec.d_model)
    ffn = _linear(spec.d_model, spec.d_ff) + _linear(spec.d_ff, spec.d_model)

    total = active = embeddings + spec.num_layers * (2 * norm + attention) + norm
    for layer in range(spec.num_layers):
        num_experts = spec.experts_in_layer(layer)
        if not num_experts:
            total, active = total + ffn, active + ffn
            continue
        every = num_experts * spec.d_model + spec.router.residual_layers * (norm + ffn)
        if spec.residual_moe:
            every += ffn + _linear(spec.d_model, 2)
        total += every + num_experts * ffn
        active += every + round(spec.router.rows_per_token * ffn)
    return Count(total, active)


def _linear(d_in: int, d_out: int) -> int:
    return d_in * d_out + d_out
