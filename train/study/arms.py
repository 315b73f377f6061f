"""The arms of a study of routers by name, and what each does unlike the others. No torch.

All of them share the study's model, data, order of samples and recipe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from gptmoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to build the feed-forward layers."""

    name: str
    meaning: str
    experts: bool = True
    layers: int = 1
    """So many times the study's layers."""
    overrides: tuple[str, ...] = ()


_ALL = (
    Arm(name="dense", meaning="no experts: the size that all others are fitted to", experts=False),
    Arm(
        name="dense_2x",
        meaning="no experts, twice the layers: attention and FFN cost twice as much a token",
        experts=False,
        layers=2,
    ),
    Arm(
        name="switch",
        meaning="top-1 with capacity and balance loss (arXiv 2101.03961)",
        overrides=("router.kind=switch",),
    ),
    Arm(
        name="top2",
        meaning="top-2 with normalised weights (GShard, arXiv 2006.16668)",
        overrides=("router.kind=top2",),
    ),
    Arm(
        name="s_base",
        meaning="Sinkhorn assignment in training, argmax at evaluation (arXiv 2202.01169)",
        overrides=("router.kind=s_base",),
    ),
    Arm(
        name="expert_choice",
        meaning="experts choose tokens; L-Softmax; one expert residual layer; thresholds",
        overrides=(
            "router.kind=expert_choice",
            "router.capacity_factor=1.0",
            "router.residual_depth=1",
        ),
    ),
    Arm(
        name="expert_choice_bare",
        meaning="the same without expert residual",
        overrides=(
            "router.kind=expert_choice",
            "router.capacity_factor=1.0",
            "router.residual_depth=0",
        ),
    ),
    Arm(
        name="loss_free",
        meaning="top-1, balanced by a bias in place of a loss (arXiv 2408.15664)",
        overrides=("router.kind=loss_free",),
    ),
)
ARMS: Mapping[str, Arm] = MappingProxyType({arm.name: arm for arm in _ALL})
"""In the order of the page."""

CHOICE = "expert_choice"
REFERENCE = "dense"


@dataclass(frozen=True, slots=True, order=True)
class Variant:
    """An arm with a number of experts; 0 of a dense one."""

    arm: str
    experts: int = 0

    @property
    def name(self) -> str:
        """As `dense` or `switch-8`: its folder, and its row in each table."""
        return f"{self.arm}-{self.experts}" if self.experts else self.arm


def check_names(names: Sequence[str], key: str = "study.arms") -> None:
    """Raise ConfigError for an arm that is not known, named twice, or lacks its reference."""
    for name in names:
        if name not in ARMS:
            near = get_close_matches(name, ARMS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"{key} names {name!r}, which is no arm; {hint}known arms: {', '.join(ARMS)}"
            )
    if key != "study.arms":
        return
    if REFERENCE not in names:
        raise ConfigError(
            f"{key}={list(names)} lacks {REFERENCE}, whose cost the others are fitted to; add it"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"{key}={list(names)} names an arm twice; once is enough")


def variants(names: Sequence[str], experts: Sequence[int]) -> tuple[Variant, ...]:
    """The arms in the page's order, those with experts once for each number of them."""
    chosen = [arm for arm in ARMS.values() if arm.name in names]
    return tuple(
        Variant(arm.name, number) for arm in chosen for number in (experts if arm.experts else (0,))
    )
