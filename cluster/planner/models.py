"""The model and the batch that a plan is for: by a preset's name, or from a resolved config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptmoe.config import build
from gptmoe.errors import ConfigError
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec, RouterSpec, expand_experts

from .devices import Dtype
from .job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model with the batch it is usually trained by."""

    name: str
    spec: ModelSpec
    batch_tokens: int
    seq_len: int
    dtype: Dtype = "bfloat16"

    def job(
        self,
        *,
        batch_tokens: int | None = None,
        seq_len: int | None = None,
        dtype: Dtype | None = None,
        fused_attention: bool = True,
    ) -> Job:
        """The job, with parts replaced. Raises ConfigError unless the batch is whole sequences."""
        tokens, length = batch_tokens or self.batch_tokens, seq_len or self.seq_len
        if tokens % length:
            below = max(tokens // length, 1) * length
            raise ConfigError(
                f"train.batch_tokens={tokens} must be whole sequences of data.seq_len={length}; "
                f"use {below} or {below + length}"
            )
        return Job(
            spec=self.spec,
            batch_sequences=tokens // length,
            seq_len=length,
            dtype=dtype or self.dtype,
            fused_attention=fused_attention,
        )


def by_name(name: str) -> Subject:
    """A preset. Raises ConfigError for an unknown name, with the nearest ones."""
    recipe = preset(name)
    return Subject(
        name=recipe.name,
        spec=recipe.spec,
        batch_tokens=recipe.batch_tokens,
        seq_len=recipe.seq_len,
    )


def vocabulary_missing(config: Mapping[str, Any]) -> bool:
    """Whether the size of the vocabulary is that of the config's tokenizer, which must be read."""
    model = config["model"]
    return not model.get("preset") and model.get("vocab_size") is None


def by_config(name: str, config: Mapping[str, Any], tokenizer_vocab: int = 0) -> Subject:
    """A training config as plain, resolved data.

    Raises ConfigError if it names a checkpoint instead of a model's parts, or no batch.
    """
    model = {key: value for key, value in config["model"].items() if value not in (None, "")}
    if "checkpoint" in model:
        raise ConfigError(
            f"{name} takes its model from model.checkpoint={model['checkpoint']}; "
            "plan wants model.preset, or the parts: num_layers, d_model, num_heads, ..."
        )
    base = preset(model.pop("preset")) if "preset" in model else None
    length, train = config["data"]["seq_len"], config["train"]
    batch_tokens = train.get("batch_tokens") or (base.batch_tokens if base else 0)
    if not batch_tokens:
        raise ConfigError(f"{name} has no train.batch_tokens; give it, or --batch-tokens")
    defaults = {"vocab_size": tokenizer_vocab, "max_seq_len": length}
    router = build(RouterSpec, config.get("router", {}), "router.")
    return Subject(
        name=name,
        spec=_spec(model, base.spec, router) if base else _whole_spec(defaults | model, router),
        batch_tokens=batch_tokens,
        seq_len=length,
        dtype=train.get("dtype", "float32"),
    )


_SIZES = (
    "num_layers", "d_model", "num_heads", "d_ff", "vocab_size", "max_seq_len",
    "expert_interval", "residual_moe", "dropout", "init_std",
)  # fmt: skip


def _spec(model: dict[str, Any], base: ModelSpec, router: RouterSpec) -> ModelSpec:
    """A preset with parts replaced."""
    values = {key: getattr(base, key) for key in _SIZES} | model
    if "d_model" in model and "d_ff" not in model:
        values["d_ff"] = 4 * values["d_model"]
    experts = model.get("num_experts", base.num_experts[0] if base.num_experts else 0)
    return _with_experts(values, experts, router)


def _whole_spec(model: dict[str, Any], router: RouterSpec) -> ModelSpec:
    """All parts named, as train's own config checks them."""
    values = {"d_ff": 4 * model["d_model"], "expert_interval": 2} | model
    return _with_experts(values, model.get("num_experts", 0), router)


def _with_experts(values: dict[str, Any], experts: Any, router: RouterSpec) -> ModelSpec:
    experts = experts if isinstance(experts, int) else tuple(experts)
    values["num_experts"] = expand_experts(experts, values["num_layers"], values["expert_interval"])
    return ModelSpec(**values, router=router)
