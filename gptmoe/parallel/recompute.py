"""Activation recompute: less memory for more work, with the same gradients.

`sel` forgets the inside of attention only, where memory grows with the square of the length
(Korthikanti et al. 2022, arXiv 2205.05198, section 5); `full` all of a layer but its input (Chen et
al. 2016, arXiv 1604.06174). Nothing here draws random numbers: masks are functions of the samples.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptmoe.model.layers import Attend, Attention
from gptmoe.model.transformer import GPT, Block
from gptmoe.model.turns import Pausing, straight

Recompute = Literal["none", "sel", "full"]


def recompute(model: GPT, what: Recompute) -> None:
    """Let the layers of a model compute `what` again in the backward pass."""
    for block in model.layers:
        if isinstance(block, Block) and what == "full":
            block.__class__ = RecomputedBlock
        elif isinstance(block, Block) and what == "sel":
            block.attention.__class__ = RecomputedAttention


class RecomputedBlock(Block):
    """A layer that keeps its input alone. It does not pause: it runs again as a whole."""

    def steps(self, *arguments: Any) -> Pausing[Any]:
        yield from ()
        plain = super().steps
        return again(lambda *given: straight(plain(*given)), *arguments)


class RecomputedAttention(Attention):
    """Keeps queries, keys and values, but no scores."""

    def forward(self, x_BTD: Tensor, layer: int, attend: Attend) -> Tensor:
        def attend_again(layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
            result: Tensor = again(attend, layer, q_BTHK, k_BTHK, v_BTHK)
            return result

        return super().forward(x_BTD, layer, attend_again)


def again(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function and keep its arguments alone: the backward pass calls it again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
