"""The routers by the names that a config gives them."""

from collections.abc import Mapping
from types import MappingProxyType

from gptmoe.errors import ConfigError

from .expert_choice import ExpertChoiceRouter
from .loss_free import LossFreeRouter
from .routing import LinearRouter
from .spec import ModelSpec
from .switch import SwitchRouter

ROUTERS: Mapping[str, type[LinearRouter]] = MappingProxyType(
    {
        "switch": SwitchRouter,
        "expert_choice": ExpertChoiceRouter,
        "loss_free": LossFreeRouter,
    }
)


def make_router(spec: ModelSpec, num_experts: int) -> LinearRouter:
    """The router that `spec.router.kind` names. Raises ConfigError if there is none."""
    kind = spec.router.kind
    if kind not in ROUTERS:
        raise ConfigError(f"router.kind={kind!r} is not known; use one of {', '.join(ROUTERS)}")
    return ROUTERS[kind](spec.d_model, num_experts, spec.router)
