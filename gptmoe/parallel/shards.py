"""ZeRO 3: data ranks share the rows of every large weight, and see one whole only while it is used.

Each product gathers its weight, and its backward pass gathers it again; the gradient leaves summed
over the data ranks and cut up (Rajbhandari et al. 2020, arXiv 1910.02054, section 5.3). Norms and
biases, a thousandth of the weights, stay whole on every rank. The rows may lie in another memory
than the computation (ZeRO-Offload, Ren et al. 2021, arXiv 2101.06840): they travel when gathered.

A shard is a box like any other cut, so the norm, the optimizer's state and the checkpoint need
nothing of their own, and float64 works as well as float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptmoe.model.layers import Embedding, Linear, linear
from gptmoe.model.transformer import GPT

from .collectives import gather_rows, scatter_rows
from .recompute import again


@dataclass(frozen=True, slots=True)
class Shards:
    """The data ranks that share the rows of one weight. Collective."""

    group: dist.ProcessGroup | None
    index: int
    """This rank's number among them."""
    sizes: tuple[int, ...]
    """Rows of each rank."""

    def whole(self, rows: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight on the device of `like`, in `dtype` (default: as it is kept)."""
        result: Tensor = _Whole.apply(rows, self, like.device, dtype or rows.dtype)  # type: ignore[no-untyped-call]
        return result


class ShardedLinear(Linear):
    """A linear layer whose weight is gathered for each product."""

    shards: Shards

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        y = product(x, self.weight, self.shards, self.bias)
        return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y


class ShardedEmbedding(Embedding):
    """A table that is gathered for each lookup."""

    shards: Shards

    def forward(self, index: Tensor) -> Tensor:
        return torch.nn.functional.embedding(index, self.shards.whole(self.weight, index))


class ShardedGPT(GPT):
    """A GPT whose head gathers the token table."""

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores over the whole vocabulary, [B, T, V]."""
        tokens = self.embed.tokens
        if isinstance(tokens, ShardedEmbedding):
            return product(hidden_BTD, tokens.weight, tokens.shards)
        return super().logits(hidden_BTD)


def product(x: Tensor, rows: Tensor, shards: Shards, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with a gathered W, which is not kept for the backward pass but gathered again.

    There recomputing ends where the product would begin: its inputs are all that was asked for.
    """

    def once(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, shards.whole(rows, x, x.dtype), bias)

    y: Tensor = again(once, x, rows, bias)
    return y


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, shards: Shards, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        ctx.shards, ctx.kept = shards, (rows.device, rows.dtype)
        return gather_rows(rows.to(device, dtype), shards.sizes, shards.group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        device, dtype = ctx.kept
        gradient = gradients[0].to(dtype)  # summed in the weights' own type, as without shards
        shards: Shards = ctx.shards
        mine = scatter_rows(gradient, shards.sizes, shards.index, shards.group)
        return mine.to(device), None, None, None
