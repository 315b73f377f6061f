"""The model of a run: a preset with its parts replaced, all parts, or that of a checkpoint."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gptmoe.config import INPUT_PATH, Location
from gptmoe.errors import ConfigError
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec, RouterSpec, expand_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A preset, its parts replaced one by one; without a preset each part must be given."""

    preset: str = ""
    checkpoint: Location | None = field(default=None, metadata=INPUT_PATH)
    """Start from this model (finetuning): a checkpoint or a run's folder, or the URI of one."""
    num_layers: int | None = None
    d_model: int | None = None
    num_heads: int | None = None
    d_ff: int | None = None
    """Default: 4 * d_model."""
    vocab_size: int | None = None
    """Default: the preset's; without a preset, the tokenizer's."""
    max_seq_len: int | None = None
    num_experts: int | tuple[int, ...] | None = None
    expert_interval: int | None = None
    residual_moe: bool | None = None
    dropout: float | None = None
    init_std: float | None = None

    def spec(self, router: RouterSpec, tokenizer_vocab: int, seq_len: int) -> ModelSpec:
        """The complete model. Raises ConfigError naming what is missing or does not fit."""
        base = preset(self.preset).spec if self.preset else None
        values = {name: getattr(base, name) for name in _SPEC_FIELDS} if base else {}
        given = self.given()
        values |= {name: given[name] for name in _SPEC_FIELDS if name in given}
        for name in ("num_layers", "d_model", "num_heads"):
            if name not in values:
                raise ConfigError(
                    f"model.{name} is missing; give it, or a whole model as model.preset=0.125B"
                )
        if "d_ff" not in given and (base is None or "d_model" in given):
            values["d_ff"] = 4 * values["d_model"]
        values.setdefault("vocab_size", tokenizer_vocab)
        values.setdefault("max_seq_len", seq_len)
        experts = self.num_experts
        if experts is None:
            experts = base.num_experts[0] if base and base.num_experts else 0
        interval = values.get("expert_interval", 2)
        values["num_experts"] = expand_experts(experts, values["num_layers"], interval)
        return ModelSpec(**values, router=router)

    def refine(self, stored: ModelSpec, router: RouterSpec) -> ModelSpec:
        """The model of `model.checkpoint` with this run's router settings and dropout.

        Raises ConfigError for a part that is given and differs from the checkpoint's, and for a
        router that could not use what the checkpoint's has learned.
        """
        given = self.given()
        dropout = given.pop("dropout", stored.dropout)
        if given.pop("preset", ""):
            spec = preset(self.preset).spec
            given = {name: getattr(spec, name) for name in _PRESET_FIELDS} | given
        for name, value in given.items():
            found = getattr(stored, name)
            if name == "num_experts":
                value = expand_experts(value, stored.num_layers, stored.expert_interval)
            if value != found:
                raise ConfigError(
                    f"model.{name}={value} is not that of model.checkpoint, {found}; leave it out, "
                    "the checkpoint's model is used as it is"
                )
        if stored.num_experts:
            _check_router(stored.router, router)
        return dataclasses.replace(stored, router=router, dropout=dropout)

    def given(self) -> dict[str, Any]:
        """The parts of the model that the config names one by one, and the preset."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "checkpoint"]
        return {name: value for name in names if (value := getattr(self, name)) not in (None, "")}


def _check_router(stored: RouterSpec, wanted: RouterSpec) -> None:
    names = ["kind", *(["residual_depth"] if stored.kind == "expert_choice" else [])]
    for name in names:
        found, now = getattr(stored, name), getattr(wanted, name)
        if found != now:
            raise ConfigError(
                f"router.{name}={now} is not that of model.checkpoint, {found}, whose weights and "
                f"state belong to it; use router.{name}={found}, or start without model.checkpoint"
            )


_PRESET_FIELDS = ("num_layers", "d_model", "num_heads", "num_experts")
_SPEC_FIELDS = (
    "num_layers", "d_model", "num_heads", "d_ff", "vocab_size", "max_seq_len",
    "expert_interval", "residual_moe", "dropout", "init_std",
)  # fmt: skip
