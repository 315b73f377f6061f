"""The routers by the names that a config gives them."""

from collections.abc import Mapping
from types import MappingProxyType

from .expert_choice import ExpertChoiceRouter
from .loss_free import LossFreeRouter
from .routing import LinearRouter
from .s_base import SinkhornRouter
from .spec import ModelSpec
from .switch import SwitchRouter
from .top2 import Top2Router

ROUTERS: Mapping[str, type[LinearRouter]] = MappingProxyType(
    {
        "switch": SwitchRouter,
        "top2": Top2Router,
        "s_base": SinkhornRouter,
        "expert_choice": ExpertChoiceRouter,
        "loss_free": LossFreeRouter,
    }
)


def make_router(spec: ModelSpec, num_experts: int) -> LinearRouter:
    """The router that `spec.router.kind` names."""
    return ROUTERS[spec.router.kind](spec.d_model, num_experts, spec.router)
