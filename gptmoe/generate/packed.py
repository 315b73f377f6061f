"""Weights in the layout that the CPU's matrix kernels read: the same products, twice as fast.

A packed product also gives each row the same bits whatever the number of rows (from MIN_ROWS on)
and of threads, which plain float32 products on several threads do not.
"""

from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from gptmoe.model.experts import Experts, expert_spans
from gptmoe.model.layers import Linear, ServedWeight, linear
from gptmoe.model.moe import MoE
from gptmoe.model.residual_moe import Mix
from gptmoe.model.routing import LinearRouter
from gptmoe.model.transformer import GPT

from .fused_experts import entering_experts
from .fused_network import fuse
from .kernels.plain import PlainWeight, kernels_of_mapped
from .kernels.router_weight import router_weight
from .packed_weight import PackedWeight, can_pack, packed_weight

W = TypeVar("W")


def pack(network: GPT, *, head: bool = True, experts: bool = True) -> bool:
    """Pack the weights of a network for inference in place; False if this machine cannot.

    Each plain weight is given up as its packed copy is made; only the token table, which is read by
    rows too, is kept beside the copy that serves as the `head`. Without `experts` theirs stay as
    they lie: memory-mapped ones then take only the memory of those that were asked for. A packed
    network cannot be trained.
    """
    dtype = network.compute_dtype
    if not can_pack(dtype, next(network.parameters()).device):
        return False
    if head:
        network.head = partial(linear, weight=packed_weight(network.embed.tokens.weight, dtype))
    for module in list(network.modules()):
        if isinstance(module, Linear):
            module.weight = packed_weight(module.weight, dtype)
            module.bias = served_bias(module.bias, dtype)
        elif isinstance(module, (LinearRouter, Mix)):
            pack_router(module)
        elif isinstance(module, MoE):
            held = module.experts
            module.experts = PackedExperts(held, dtype) if experts else mapped_experts(held)
    network.fixed_rows = not _take_any_rows(network)
    fuse(network)
    return True


def _take_any_rows(network: GPT) -> bool:
    """Whether steps may have any number of rows. Products see to that; in float32 it is cheaper to
    have enough rows from the start, unless there are kernels for few."""
    if network.compute_dtype == torch.bfloat16:
        return True
    weights = [module.weight for module in network.modules() if isinstance(module, Linear)]
    return all(isinstance(weight, PackedWeight) and weight.few_rows for weight in weights)


def pack_router(router: LinearRouter | Mix) -> None:
    """What decides computes in float32 whatever the type of the model."""
    served = router_weight(router.weight)
    router.weight = packed_weight(router.weight, torch.float32) if served is None else served


def served_bias(bias: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """In the type that computes: kernels read it where it lies, so it must not be in another one,
    nor move."""
    return nn.Parameter(bias.detach().to(dtype), requires_grad=False)


class SeparateExperts(Experts, Generic[W]):
    """Experts for inference, each with weights of its own that `make` made of the plain ones; what
    they compute has type `dtype`."""

    def __init__(self, experts: Experts, make: Callable[[Tensor], W], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.first = experts.first
        self.up = [make(weight) for weight in experts.up_weight.detach()]
        del experts.up_weight
        self.down = [make(weight) for weight in experts.down_weight.detach()]
        del experts.down_weight
        self.up_bias = served_bias(experts.up_bias, dtype)
        self.down_bias = served_bias(experts.down_bias, dtype)
        self.entering = entering_experts(self.up, self.down, self.up_bias, self.down_bias)

    @property
    def count(self) -> int:
        """Number of experts held here."""
        return len(self.up)

    def forward(self, rows_RD: Tensor, rows_per_expert: list[int]) -> Tensor:
        """See Experts.forward."""
        spans = expert_spans(rows_per_expert)
        if self.entering and spans and self.entering.are_few(spans):
            return self.entering.run(rows_RD.contiguous(), spans)
        parts = [self._one(expert, rows_RD[start:end]) for expert, start, end in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else rows_RD

    def _one(self, expert: int, x_RD: Tensor) -> Tensor:
        hidden_RF = self._product(x_RD, self.up[expert], self.up_bias[expert], gelu=True)
        return self._product(hidden_RF, self.down[expert], self.down_bias[expert])

    def _product(self, x: Tensor, weight: W, bias: Tensor, *, gelu: bool = False) -> Tensor:
        raise NotImplementedError


class ServedExperts(SeparateExperts[ServedWeight]):
    """Experts whose weights compute their own products."""

    def _product(
        self, x: Tensor, weight: ServedWeight, bias: Tensor, *, gelu: bool = False
    ) -> Tensor:
        return linear(x, weight, bias, gelu=gelu)


class PackedExperts(ServedExperts):
    """Experts with packed weights."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        super().__init__(experts, partial(packed_weight, dtype=dtype), dtype)


def mapped_experts(experts: Experts) -> Experts:
    """The same experts where they lie, for inference, by the fastest products for that."""
    compiled = kernels_of_mapped(experts.up_weight) and kernels_of_mapped(experts.down_weight)
    if not compiled:
        return experts
    make = partial(PlainWeight, compiled=compiled)
    return ServedExperts(experts, make, experts.up_weight.dtype)
